"""What TensorBoard shows of a run: as it reads the files, and in a browser."""

import io
import json
import pathlib
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import numpy as np
import pytest
from PIL import Image

from grpo_tpu.observability import dashboard
from tests.e2e import browser

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.e2e

CURVES = (
  "rollout/reward",
  "rollout/accuracy",
  "rollout/completion_length",
  "rollout/truncated_fraction",
  "train/entropy",
  "train/kl",
  "train/clip_fraction",
  "perf/tokens_per_second",
)


def events_of(run):
  """Everything in the event files of a workdir, by tag."""
  from tensorboard.backend.event_processing import event_accumulator

  events = event_accumulator.EventAccumulator(
    str(run.workdir), size_guidance={"tensors": 0}
  )
  return events.Reload()


def points(events, tag: str) -> list[tuple[int, float]]:
  from tensorboard.util import tensor_util

  return [
    (event.step, tensor_util.make_ndarray(event.tensor_proto).item())
    for event in events.Tensors(tag)
  ]


def test_the_curves_are_those_of_the_metrics_file(unbroken):
  events = events_of(unbroken)
  curves = events.PluginTagToContent("scalars")
  assert set(CURVES) <= set(curves)
  assert set(curves) == set().union(*unbroken.rows()) - {"step"}
  for name in CURVES:
    written = [
      (row["step"], float(np.float32(row[name])))
      for row in unbroken.rows()
      if name in row
    ]
    assert len(written) == 6
    assert points(events, name) == written


def test_no_step_is_drawn_twice_after_a_kill(resumed):
  events = events_of(resumed)
  for name in CURVES:
    steps = [step for step, _ in points(events, name)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 6


def test_there_are_completions_to_read_and_pictures_to_see(unbroken):
  events = events_of(unbroken)
  texts, images = map(events.PluginTagToContent, ("text", "images"))
  for split, steps in (("train", [2, 4, 6]), ("eval", [0, 3, 6])):
    text, image = (f"samples/{split}/0/{sort}" for sort in ("text", "image"))
    assert text in texts
    assert image in images
    for tag in (text, image):
      assert [event.step for event in events.Tensors(tag)] == steps
    words = events.Tensors(text)[0].tensor_proto.string_val[0].decode()
    assert "right answer:" in words
    # Width, height, then the picture.
    _, _, png = events.Tensors(image)[0].tensor_proto.string_val
    assert png.startswith(b"\x89PNG")


def test_every_number_of_a_run_is_explained_on_the_page(unbroken):
  page = (ROOT / "docs" / "metrics.md").read_text()
  rows = re.findall(r"^\| `(.*?)` ", page, re.MULTILINE)
  known = re.compile("|".join(r.replace("{slice}", r"[\w.-]+") for r in rows))
  names = set().union(*unbroken.rows()) - {"step"}
  assert [name for name in names if not known.fullmatch(name)] == []


def test_the_card_of_a_run_says_what_it_ran_on_and_how_it_ended(
  unbroken, resumed
):
  card = json.loads((unbroken.workdir / "run.json").read_text())
  (attempt,) = card["attempts"]
  assert attempt["exit_code"] == 0 and attempt["step"] == 6
  assert card["end"]["newest_checkpoint"].endswith("checkpoints/00000006")
  # Killed twice, of which nothing was left to say.
  card = json.loads((resumed.workdir / "run.json").read_text())
  assert [a["exit_code"] for a in card["attempts"]] == [None, None, 0]


@pytest.fixture(scope="module")
def tensorboard(unbroken, tmp_path_factory):
  """The address of a TensorBoard on the workdir of a run."""
  log = tmp_path_factory.mktemp("tensorboard") / "log.txt"
  with log.open("wb") as file:
    process = subprocess.Popen(
      [sys.executable, "-m", "tensorboard.main", f"--logdir={unbroken.workdir}"]
      + ["--host=127.0.0.1", "--port=0", "--load_fast=false"],
      stdout=file,
      stderr=subprocess.STDOUT,
    )
  try:
    deadline = time.monotonic() + 120
    while not (found := re.search(r"http://\S+/", log.read_text())):
      assert process.poll() is None and time.monotonic() < deadline
      time.sleep(0.2)
    # What it has not read yet it would show to no page that is open.
    while not asked(found[0], "data/plugin/custom_scalars/layout"):
      assert time.monotonic() < deadline
      time.sleep(0.5)
    yield found[0]
  finally:
    process.kill()
    process.wait()


def asked(address: str, path: str, **parameters: str):
  query = urllib.parse.urlencode(parameters)
  with urllib.request.urlopen(f"{address}{path}?{query}") as answer:
    return json.load(answer)


def test_tensorboard_serves_the_layout_and_the_curves_of_each_chart(
  tensorboard, unbroken
):
  """Together they show every number of the run; no chart is empty."""
  plugin = "data/plugin/custom_scalars"
  layout = asked(tensorboard, f"{plugin}/layout")
  titles = [category["title"] for category in layout["category"]]
  assert titles == list(dashboard.sections())
  first = layout["category"][0]["chart"][0]
  assert first["multiline"]["tag"] == ["^eval/accuracy$"]
  shown = set()
  for category in layout["category"]:
    for chart in category["chart"]:
      before = len(shown)
      for tag in chart["multiline"]["tag"]:
        curves = asked(tensorboard, f"{plugin}/scalars", run=".", tag=tag)
        assert curves["regex_valid"]
        shown |= {
          name for name, points in curves["tag_to_events"].items() if points
        }
      assert len(shown) > before, chart["title"]
  assert shown == set().union(*unbroken.rows()) - {"step"}


# All elements, those inside of others' shadows too, which CSS cannot select.
ALL = """
const all = name => {
  const found = [];
  const walk = root => {
    for (const each of root.querySelectorAll('*')) {
      if (each.matches(name)) found.push(each);
      if (each.shadowRoot) walk(each.shadowRoot);
    }
  };
  walk(document);
  return found;
};
const box = each => {
  const {x, y, width, height} = each.getBoundingClientRect();
  return [x, y, width, height].map(Math.round);
};
"""


def script(body: str) -> str:
  return f"(() => {{ {ALL} {body} }})()"


def colourful(png: bytes, box: list[int]) -> int:
  """How many pixels of a part of a screenshot are neither grey nor white."""
  x, y, width, height = box
  image = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), np.int16)
  part = image[max(y, 0) : y + height, max(x, 0) : x + width]
  return int((part.max(-1) - part.min(-1) > 60).sum())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
  program = browser.find()
  if program is None:
    pytest.skip("no Chromium: apt-get install chromium-headless-shell")
  log = tmp_path_factory.mktemp("browser") / "log.txt"
  with browser.page(program, log) as page:
    yield page


def test_a_browser_shows_the_charts_of_the_layout(tensorboard, page, unbroken):
  page.open(f"{tensorboard}#custom_scalars", width=1280, height=900)
  names = set().union(*unbroken.rows()) - {"step"}
  charts = dashboard.charts_of(names)
  assert next(iter(charts["Learning"])) == "eval accuracy"
  count = sum(map(len, charts.values()))
  cards = "tf-custom-scalar-multi-line-chart-card"
  page.wait_for(script(f"return all('{cards}').length == {count}"))
  headings = page.value(
    script(
      "return all('tf-category-paginated-view').map(x => x.shadowRoot"
      ".textContent)"
    )
  )
  for title, text in zip(dashboard.sections(), headings, strict=True):
    assert title in text
  # Below each chart stand the curves that are on it.
  curves = "return all('.match-list-entry').map(x => x.innerText.trim())"
  page.wait_for(
    script(
      f"{curves.replace('return', 'const c =')}; "
      f"return c.length >= {len(names)}"
    )
  )
  shown = " ".join(page.value(script(curves)))
  for name in CURVES:
    assert re.search(rf"\b{name} \(\.\)", shown)
  box = page.value(script("return box(all('vz-line-chart2')[0])"))
  deadline = time.monotonic() + 60
  while not colourful(page.screenshot(), box) > 100:
    assert time.monotonic() < deadline, "no curve is drawn"


def test_a_browser_shows_the_pictures_of_the_samples(tensorboard, page):
  # Its own page, for a change of the part after # alone opens none.
  page.open("about:blank", width=1280, height=900)
  page.open(f"{tensorboard}#images", width=1280, height=900)
  pictures = (
    "all('tf-image-loader').flatMap(x => [...x.shadowRoot.querySelectorAll("
    "'img')]).filter(x => x.naturalWidth >= 320)"
  )
  page.wait_for(script(f"return {pictures}.length"))
  box = page.value(script(f"return box({pictures}[0])"))
  deadline = time.monotonic() + 60
  while not colourful(page.screenshot(), box) > 1000:
    assert time.monotonic() < deadline, "no picture is drawn"
