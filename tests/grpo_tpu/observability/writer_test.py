"""A run writes declared names, every digit, and no step twice."""

import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_tpu.observability import event_files, sample_files, writer

SCALARS = {
  "train/loss": -0.25,
  "rollout/reward": 0.1 + 0.2,
  "eval/accuracy": 0.5,
  "eval/accuracy/free_form": 0.25,
  "eval/accuracy/multi_choice": 0.75,
  "perf/step_seconds": 1.5,
}


class MemoryEvents:
  """Stands in for CLU's writer, which takes TensorFlow's import to make."""

  def __init__(self):
    self.calls = []

  def __getattr__(self, name):
    return lambda *args: self.calls.append((name, *args))


@pytest.fixture(autouse=True)
def events(monkeypatch):
  events = MemoryEvents()
  monkeypatch.setattr(event_files, "_open_events", lambda *_: events)
  return events


def open_writer(path, *, is_writer=True, resume_step=None):
  return writer.Writer(path, is_writer=is_writer, resume_step=resume_step)


def rows_of(path):
  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  lines = path.read_text().splitlines()
  return [json.loads(line, parse_constant=refuse) for line in lines]


def make_sample(
  pid="p1",
  *,
  completion="<answer>3</answer>",
  question="How many?",
  answer="3",
  image=None,
):
  columns = {
    "group": 0,
    "generation": 0,
    "pid": pid,
    "prompt": f"<bos>{question}",
    "completion": completion,
    "answer": answer,
    "reward": 0.9,
    "reward/format": 1.0,
    "advantage": None,
  }
  return sample_files.Sample(columns, question, image)


def samples_of(path):
  """The rows of all files in the folder of samples."""
  return pandas.read_parquet(path / "samples")


def test_a_line_has_its_names_in_declared_order(tmp_path):
  with open_writer(tmp_path) as w:
    w.write(1, SCALARS)
    w.write(2, dict(reversed(SCALARS.items())))
  rows = rows_of(tmp_path / "metrics.jsonl")
  assert [list(row) for row in rows] == [["step", *SCALARS]] * 2


def test_a_line_is_on_disk_when_write_returns(tmp_path):
  with open_writer(tmp_path) as w:
    for step in (0, 1):
      w.write(step, {"train/loss": step / 3})
      assert rows_of(tmp_path / "metrics.jsonl")[-1] == {
        "step": step,
        "train/loss": step / 3,
      }


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_digit_is_kept(tmp_path_factory, value):
  path = tmp_path_factory.mktemp("run")
  with open_writer(path) as w:
    w.write(1, {"train/loss": value})
  (row,) = rows_of(path / "metrics.jsonl")
  assert math.copysign(1, row["train/loss"]) == math.copysign(1, value)
  assert row["train/loss"] == value


@pytest.mark.parametrize(
  ("value", "expected"),
  [
    (jnp.float32(0.1), float(np.float32(0.1))),
    (jnp.bfloat16(0.1), 0.10009765625),  # 205 / 2048.
    (np.float64(0.1), 0.1),
    (np.ones(()), 1.0),
    (jnp.int32(3), 3),
    (True, 1),
    (math.nan, None),
    (jnp.float32(-jnp.inf), None),
  ],
)
def test_a_number_of_any_type_is_written_as_json(tmp_path, value, expected):
  with open_writer(tmp_path) as w:
    w.write(1, {"train/loss": value})
  (row,) = rows_of(tmp_path / "metrics.jsonl")
  assert row == {"step": 1, "train/loss": expected}
  assert type(row["train/loss"]) is type(expected)


def test_the_event_files_get_the_number_itself_even_if_not_finite(
  tmp_path, events
):
  with open_writer(tmp_path) as w:
    w.write(1, {"train/loss": jnp.float32(jnp.inf)})
  assert ("write_scalars", 1, {"train/loss": math.inf}) in events.calls


def test_device_scalars_are_fetched_together(tmp_path, monkeypatch):
  fetched = []
  device_get = jax.device_get
  monkeypatch.setattr(
    jax, "device_get", lambda tree: fetched.append(tree) or device_get(tree)
  )
  with open_writer(tmp_path) as w:
    w.write(1, {"train/loss": jnp.float32(1), "train/kl": jnp.float32(2)})
  assert [sorted(tree) for tree in fetched] == [["train/kl", "train/loss"]]


@pytest.mark.parametrize("is_writer", [True, False])
@pytest.mark.parametrize(
  "name", ["train/los", "eval/accuracy/{slice}", "eval/accuracy/a/b", "loss"]
)
def test_an_undeclared_name_is_refused_on_every_host(tmp_path, name, is_writer):
  with open_writer(tmp_path, is_writer=is_writer) as w:
    with pytest.raises(
      ValueError, match=re.escape(f"{name!r} is not declared")
    ):
      w.write(1, {"train/kl": 0.0, name: 1.0})


def test_a_misspelt_name_gets_a_suggestion(tmp_path):
  with open_writer(tmp_path) as w:
    with pytest.raises(ValueError, match="mean 'train/loss'"):
      w.write(1, {"train/los": 1.0})


@pytest.mark.parametrize("value", [jnp.zeros(1), np.zeros((2, 3)), "1.0"])
def test_a_value_that_is_not_one_number_is_refused(tmp_path, value):
  with open_writer(tmp_path) as w:
    with pytest.raises(ValueError, match="'train/loss' must be one number"):
      w.write(1, {"train/loss": value})


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("is_writer", [True, False])
def test_a_step_cannot_be_written_twice(tmp_path, step, is_writer):
  with open_writer(tmp_path, is_writer=is_writer) as w:
    w.write(2, {"train/loss": 0.0})
    with pytest.raises(ValueError, match=f"step {step} .* after step 2"):
      w.write(step, {"train/kl": 0.0})


def test_the_restored_step_cannot_be_written_again(tmp_path):
  with open_writer(tmp_path, resume_step=7) as w:
    with pytest.raises(ValueError, match="step 7 .* after step 7"):
      w.write(7, {"train/loss": 0.0})


def test_only_process_0_writes(tmp_path):
  with open_writer(tmp_path / "run", is_writer=False) as w:
    w.write(1, SCALARS)
    w.write_samples(1, [make_sample()], split="train")
    w.write_config({"seed": 0})
    w.log_progress(1)
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("killed_after", [3, 4, 6])
@pytest.mark.parametrize("num_torn_bytes", [0, 1, 9])
def test_a_resumed_run_ends_with_the_lines_of_the_unbroken_one(
  tmp_path, killed_after, num_torn_bytes
):
  """The run resumes from step 3, whatever the kill left after it."""

  def run(path, steps, resume_step):
    with open_writer(path, resume_step=resume_step) as w:
      for step in steps:
        w.write(step, {"train/loss": 1 / (step + 1)})
        w.write_samples(step, [make_sample(f"p{step}")] * 2, split="train")

  run(tmp_path / "unbroken", range(9), None)
  run(tmp_path / "broken", range(killed_after + 1), None)
  path = tmp_path / "broken" / "metrics.jsonl"
  torn = path.read_bytes().splitlines(keepends=True)[-1][:num_torn_bytes]
  path.write_bytes(path.read_bytes() + torn)
  late = tmp_path / "broken" / "samples" / ".step_00000004.parquet.tmp"
  late.write_bytes(b"PAR1, and then a kill")
  run(tmp_path / "broken", range(4, 9), 3)
  files = sorted(
    x.relative_to(tmp_path / "unbroken")
    for x in (tmp_path / "unbroken").rglob("*.*")
  )
  assert len(files) == 1 + 9
  for name in files:
    expected = (tmp_path / "unbroken" / name).read_bytes()
    assert (tmp_path / "broken" / name).read_bytes() == expected
  assert not late.exists()


def test_a_whole_line_without_its_end_counts_as_torn(tmp_path):
  """Otherwise the next line would be appended to it."""
  with open_writer(tmp_path) as w:
    for step in (1, 2):
      w.write(step, {"train/loss": 0.5})
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(path.read_bytes()[:-1])
  with open_writer(tmp_path, resume_step=2) as w:
    w.write(3, {"train/loss": 0.5})
  assert [row["step"] for row in rows_of(path)] == [1, 3]


def test_a_run_from_the_start_removes_the_files_of_an_earlier_run(tmp_path):
  for _ in range(2):
    with open_writer(tmp_path) as w:
      w.write(0, {"eval/accuracy": 0.5})
      w.write_samples(0, [make_sample()], split="train")
  assert len(rows_of(tmp_path / "metrics.jsonl")) == 1
  assert len(samples_of(tmp_path)) == 1


def test_a_sample_is_a_row_a_text_and_an_image(tmp_path, events):
  image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
  hidden = sample_files.Sample(make_sample("c").columns)
  samples = [make_sample("a"), make_sample("b", image=image), hidden]
  with open_writer(tmp_path) as w:
    w.write_samples(5, samples, split="train")
    w.write_samples(5, samples[:2], split="eval")
  rows = samples_of(tmp_path)
  assert rows.pid.tolist() == ["a", "b", "c"]
  assert rows.iloc[0].dropna().to_dict() == {
    "step": 5,
    "group": 0,
    "generation": 0,
    "pid": "a",
    "prompt": "<bos>How many?",
    "completion": "<answer>3</answer>",
    "answer": "3",
    "reward": np.float32(0.9),
    "reward/format": 1.0,
  }
  assert np.isnan(rows.advantage[0]) and rows.advantage.dtype == np.float32
  calls = {name: args for name, *args in events.calls}
  step, texts = calls["write_texts"]
  assert (step, list(texts)) == (
    5,
    ["samples/eval/0/text", "samples/eval/1/text"],
  )
  step, images = calls["write_images"]
  assert (step, list(images)) == (5, ["samples/eval/1/image"])
  (shown,) = images["samples/eval/1/image"]
  # Enlarged by a whole number, with words under it.
  np.testing.assert_array_equal(shown[:320:160, ::160], image)
  assert shown.shape[0] > 320 and shown.shape[1] == 320


def test_any_completion_is_kept(tmp_path):
  completion = "a\nb\r\u2028c\x00\u00e9\U0001f600"
  with open_writer(tmp_path) as w:
    for step, text in enumerate((completion, "a lone \ud800")):
      w.write_samples(step, [make_sample(completion=text)], split="train")
  assert samples_of(tmp_path).completion.tolist() == [
    completion,
    r"a lone \ud800",
  ]


def test_a_sample_text_shows_tags_and_fences_as_they_are():
  sample = make_sample(completion="```\n<answer>\n\n3</answer>")
  lines = writer.sample_text(sample).split("\n")
  code = [line for line in lines if line.startswith("    ")]
  for line in ("```", "<answer>", "", "3</answer>", "How many?"):
    assert f"    {line}" in code
  assert not [line for line in lines if line not in code and "<" in line]


BREAKS = [
  *("\n", "\r", "\r\n", "\r\r", "\n\n", "\x0b", "\x0c", "\x1c", "\x85"),
  *("\u2028", "\u2029", "\x02", "\x03", "\x00"),
]


@pytest.mark.parametrize("field", ["pid", "question", "completion", "answer"])
def test_a_sample_renders_to_nothing_but_text_in_tensorboard(field):
  """Whatever breaks a line, no image is fetched, nothing links or shouts."""
  plugin_util = pytest.importorskip("tensorboard.plugin_util")
  hostile = "".join(
    f"x{each}{each}# BIG{each}![t](https://evil.example/b.png){each}"
    f"[click](https://evil.example){each}<img src=x>{each}** ~~~ ``` {each}"
    for each in BREAKS
  )
  sample = make_sample(**{field: hostile})
  text = writer.sample_text(sample)
  page = str(plugin_util.markdown_to_safe_html(text))
  tags = set(re.findall(r"<\s*/?\s*(\w+)", page))
  assert tags <= {"p", "pre", "code"}
  assert page.count("![t](https://evil.example/b.png)") == len(BREAKS)


def test_an_image_shows_the_question_too(tmp_path, events):
  image = np.zeros((2, 2, 3), np.uint8)
  with open_writer(tmp_path) as w:
    for question in ("How many?", "How much?"):
      sample = make_sample(question=question, image=image)
      w.write_samples(5, [sample], split="eval")
  first, second = (
    args[1]["samples/eval/0/image"]
    for name, *args in events.calls
    if name == "write_images"
  )
  assert first.shape == second.shape and (first != second).any()


def test_the_config_is_text_and_flat_hparams(tmp_path, events):
  config = {"seed": 1, "mesh": {"fsdp": 4}, "buckets": (64, 128), "dir": None}
  with open_writer(tmp_path) as w:
    w.write_config(config)
  calls = {name: args for name, *args in events.calls}
  assert '"fsdp": 4' in calls["write_texts"][1]["config"]
  assert calls["write_hparams"] == [
    {"seed": 1, "mesh.fsdp": 4, "buckets": "[64, 128]", "dir": "None"}
  ]


def test_a_progress_line_has_the_main_metrics():
  scalars = {
    "perf/tokens_per_second": 411.7,
    "rollout/accuracy": 0.675,
    "rollout/reward": 0.714,
    "train/loss": 3.0,
  }
  line = writer.progress_line(120, 300, scalars, eta_seconds=79.6)
  assert line == (
    "step 120/300  reward 0.71  accuracy 0.68  412 tokens/s  ETA 1:20"
  )


@pytest.mark.parametrize(
  ("eta_seconds", "words"),
  [
    (None, ""),
    (0.4, "  ETA 0:00"),
    (59.6, "  ETA 1:00"),
    (3599.4, "  ETA 59:59"),
    (3661.0, "  ETA 1:01:01"),
    (90061.0, "  ETA 25:01:01"),
  ],
)
def test_the_eta_reads_as_a_clock(eta_seconds, words):
  line = writer.progress_line(1, 2, {}, eta_seconds=eta_seconds)
  assert line == f"step 1/2{words}"


def test_progress_is_logged_every_few_seconds_and_after_evaluations(
  tmp_path, monkeypatch, caplog
):
  """A minute to compile, then two seconds a step."""
  clock = iter([0.0, *(60.0 + 2 * step for step in range(10))])
  monkeypatch.setattr(
    writer, "time", types.SimpleNamespace(monotonic=lambda: next(clock))
  )
  with caplog.at_level("INFO", logger="absl"), open_writer(tmp_path) as w:
    for step in range(10):
      scalars = {"eval/accuracy": 0.5} if step in (0, 5) else {}
      w.write(step, scalars)
      w.log_progress(9)
  assert [record.getMessage() for record in caplog.records] == [
    "step 0/9  eval accuracy 0.500",
    "step 1/9",
    "step 4/9  ETA 0:10",
    "step 5/9  eval accuracy 0.500  ETA 0:08",
    "step 8/9  ETA 0:02",
    "step 9/9  ETA 0:00",
  ]


def test_a_partial_step_keeps_its_samples(tmp_path):
  """It does not keep the metrics that an earlier process may have written."""
  with open_writer(tmp_path) as w:
    for step in (1, 2, 3):
      w.write_samples(step, [make_sample()], split="train")
      w.write(step, {})
  for has_partial_step, steps in ((True, [1, 2]), (False, [1])):
    writer.Writer(
      tmp_path, is_writer=True, resume_step=1, has_partial_step=has_partial_step
    ).close()
    rows = rows_of(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1]
    assert samples_of(tmp_path).step.tolist() == steps


def test_a_layout_follows_each_metric_that_is_new(tmp_path, events):
  """A resumed run shows what it showed before it stopped."""

  def count():
    return sum(name == "write_summaries" for name, *_ in events.calls)

  with open_writer(tmp_path) as w:
    for step, scalars in enumerate(({}, SCALARS, SCALARS)):
      w.write(step, scalars)
  assert count() == 1
  with open_writer(tmp_path, resume_step=2) as w:
    w.write(3, {"train/loss": 0.5})
  first, second = (
    args[1] for name, *args in events.calls if name == "write_summaries"
  )
  assert first == second


def test_a_file_that_cannot_be_written_is_counted(tmp_path, caplog):
  with open_writer(tmp_path) as w:
    hindrance = tmp_path / "samples" / "step_00000001.parquet"
    hindrance.mkdir()
    for step in (1, 2):
      w.write_samples(step, [make_sample()], split="train")
    w.flush()
    assert w.failures == 1
    hindrance.rmdir()
    assert samples_of(tmp_path).step.tolist() == [2]
  assert "Samples in" in caplog.text
