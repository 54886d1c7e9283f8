"""The commands and the code of the guides work as they stand."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request

import pytest
from pyarrow import parquet

from data_pipelines import records
from data_pipelines.sources import readers, stored
from data_pipelines.sources.rows import guesses
from data_pipelines.text import chat_prompts
from grpo_tpu.config import defaults
from grpo_tpu.rewards import custom

ROOT = pathlib.Path(__file__).resolve().parents[1]
_NOT_COPIED = shutil.ignore_patterns(
  *(".git", ".venv*", "runs", "__pycache__", ".*_cache", "*.egg-info")
)
# Checks the flags and settings of a command line. It runs in its own process,
# since absl has one set of flags per process.
_CHECK = """
import sys
from grpo_tpu.config import flags, schema
assert flags.parse(sys.argv) == sys.argv[:1]
schema.Config.from_config_dict(flags.CONFIG.value)
"""


def blocks(page: str, language: str) -> list[str]:
  """The fenced blocks of a page in a language."""
  text = (ROOT / "docs" / page).read_text()
  return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.M)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
  """A fresh copy of the tree, with this Python's packages as its venv."""
  copy = tmp_path_factory.mktemp("fresh") / "a checkout"
  shutil.copytree(ROOT, copy, ignore=_NOT_COPIED)
  (copy / ".venv").symlink_to(sys.prefix)
  return copy


def environment(checkout: pathlib.Path) -> dict[str, str]:
  """The environment of a reader, plus the venv; nothing of the tests' own."""
  dropped = ("PYTHONPATH", "XLA_FLAGS", "JAX_PLATFORMS")
  kept = {k: v for k, v in os.environ.items() if k not in dropped}
  return kept | {"GRPO_TPU_VENV": str(checkout / ".venv")}


def run_in_shell(command: str, checkout: pathlib.Path, timeout: float) -> str:
  """Runs a command in a shell in the checkout, and returns its output."""
  ran = subprocess.run(
    ["bash", "-c", command],
    cwd=checkout,
    env=environment(checkout),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    timeout=timeout,
  )
  assert ran.returncode == 0, ran.stdout[-6000:]
  return ran.stdout


def test_every_command_of_the_guides_has_flags_and_settings_that_exist(
  checkout,
):
  """Everything but the training: no flag or setting is unknown or wrong."""
  words = [
    shlex.split(block.replace("\\\n", " "))
    for page in ("quickstart.md", "extending.md")
    for block in blocks(page, "sh")
  ]
  assert len(words) >= 5
  programs = [line for line in words if "grpo_tpu.main" in line]
  assert len(programs) >= 3
  for line in programs:
    flags = line[line.index("grpo_tpu.main") + 1 :]
    code = [sys.executable, "-c", _CHECK, *flags]
    ran = subprocess.run(code, cwd=checkout, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_rewards_of_the_guide_are_rewards(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (source,) = [x for x in blocks("extending.md", "python") if "my_rewards" in x]
  (tmp_path / "my_rewards.py").write_text(source)
  values = dict.fromkeys(records.FIELDS, "") | {"unit": "cm", "answer": "3"}
  problem = records.Problem(**values)
  for name in ("brevity", "names_the_unit"):
    reward = custom.resolve(f"my_rewards:{name}")
    rewards = reward(["3 cm", "three"], [problem, problem])
    assert len(rewards) == 2 and all(map(math.isfinite, rewards))
    assert rewards[0] != rewards[1] or name == "brevity"
  spec = importlib.util.find_spec("my_rewards")
  assert spec and spec.origin == str(tmp_path / "my_rewards.py")


def test_the_data_of_the_guide_can_be_trained_on(checkout):
  """It is drawn, read and split; no problem is rejected, no terms forbid it."""
  (source,) = [x for x in blocks("extending.md", "python") if "my_probl" in x]
  (checkout / "my_problems.py").write_text(source)
  (command,) = blocks("extending.md", "sh")
  run_in_shell(command, checkout, timeout=300)
  manifest = json.loads(
    (checkout / "runs" / "squares-data" / "manifest.json").read_text()
  )
  assert sum(manifest["counts"].values()) == 60 and not manifest["rejects"]
  assert manifest["terms"] == "" and manifest["counts"]["train"] > 30


def write_examples(folder: pathlib.Path) -> None:
  """The files that the commands of the page on data name."""
  lines = [
    {
      "question": f"Ann has {i} apples and buys 4. How many has she?",
      "answer": f"Ann has {i} + 4 = {i + 4} apples.\n#### {i + 4}",
    }
    for i in range(40)
  ]
  (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
  rows = [f"1,What is {i} and 1?,{i},{i + 1},{i + 2},B" for i in range(40)]
  quiz = "\n".join(["id,frage,A,B,C,richtig", *rows])
  (folder / "quiz.csv").write_text(quiz)


def test_the_commands_of_the_page_on_data_prepare_data(checkout, tmp_path):
  """Each as it stands; what they make is what the page says."""
  write_examples(checkout)
  commands = [
    block for block in blocks("data.md", "sh") if "MathVista" not in block
  ]
  path = f"export PATH='{checkout}/.venv/bin':$PATH\n"
  for command in commands:
    run_in_shell(path + command, checkout, timeout=300)
  found = {}
  for folder in sorted((checkout / "data").glob("[a-z]*")):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["terms"] == "" and not manifest["rejects"]
    found[folder.name] = sum(manifest["counts"].values())
    assert all((folder / name).exists() for name in listed_files())
  assert found == {"drawn": 200, "questions": 40, "quiz": 40}
  train = stored.source(checkout / "data" / "questions", "train")
  problem = train[0]
  assert problem.answer_type == "integer" and not problem.images
  assert f"+ 4 = {problem.answer} apples." in problem.solution
  quiz = stored.source(checkout / "data" / "quiz", "train")[0]
  assert quiz.question_type == "multi_choice"
  assert quiz.answer == quiz.choices[1]


def listed_files() -> list[str]:
  """The files of a data dir, as the page lists them."""
  text = (ROOT / "docs" / "data.md").read_text().partition("\n## ")[0]
  names = re.findall(r"^\| `([\w.]+/?)` \|", text, re.M)
  assert "manifest.json" in names
  return names


def table(heading: str) -> list[tuple[set[str], set[str]]]:
  """The words in code of each row of the tables under a heading."""
  page = (ROOT / "docs" / "data.md").read_text()
  text = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
  rows = re.findall(r"^\| (.*?) \| (.*) \|$", text, re.M)
  return [tuple(set(re.findall("`([^`]+)`", x)) for x in row) for row in rows]


def test_the_page_on_data_names_what_there_is():
  kinds = set().union(*(names for names, _ in table("Formats")))
  assert kinds & set(readers.KINDS) == set(readers.KINDS)
  for roles, names in table("Columns"):
    assert roles <= guesses.NAMES.keys(), roles
    known = {name for role in roles for name in guesses.NAMES[role]}
    assert {name for name in names if len(name) > 1} <= known, roles
  files = (ROOT / "data_pipelines").rglob("*.py")
  source = "".join(path.read_text() for path in files)
  reasons = set().union(*(x for x, _ in table("When records are rejected")))
  assert len(reasons) > 10
  assert not [each for each in reasons if f'"{each}"' not in source]
  variables = set(
    chat_prompts.variables(
      records.Problem(
        pid="1",
        question="Why?",
        answer="",
        question_type="free_form",
        answer_type="text",
      ),
      chat_prompts.TEMPLATES["plain"],
    )
  )
  named = set().union(*(x for x, _ in table("Prompts"))) - {"tagged"}
  assert variables <= named and named - variables <= set(chat_prompts.TEMPLATES)


def test_the_templates_of_the_page_on_data_write_prompts(tmp_path):
  problem = records.Problem(
    pid="1",
    question="Which is longer?",
    images=(b"1",),
    choices=("the red line", "the blue line"),
    answer="the red line",
    unit="cm",
    question_type="multi_choice",
    answer_type="text",
  )
  first, second = blocks("data.md", "jinja")
  texts = []
  for number, source in enumerate((first, second)):
    (tmp_path / f"{number}.jinja").write_text(source)
    template = chat_prompts.open_template(str(tmp_path / f"{number}.jinja"))
    solved = dataclasses.replace(problem, question="Which is short?")
    template = dataclasses.replace(template, few_shot=1, examples=(solved,))
    template.file.try_out([chat_prompts.variables(problem, template)])
    texts.append(chat_prompts.prompt_text(problem, template=template))
  assert texts == [
    "<image>Which is longer?\n(A) the red line\n(B) the blue line\n"
    "Answer in cm. Put the last line in <answer></answer>.",
    "Q: Which is short?\nA: The answer is the red line.\n\nQ: Which is longer?",
  ]


def test_mathvista_as_the_page_prepares_it_is_evaluated_whole(
  checkout, fixtures, tmp_path
):
  """All of testmini is in the split that the page's command evaluates."""
  (block,) = [x for x in blocks("data.md", "sh") if "MathVista" in x]
  download, prepare, evaluate = block.replace("\\\n", " ").splitlines()
  assert download.startswith("hf download google/gemma-3-4b-it --local-dir /")
  assert f"--config.model.weights=hf:{download.split()[-1]}" in evaluate
  python = f'"{checkout}/.venv/bin/python"'
  prepare = prepare.replace("python", python, 1).replace(
    "=DIR", f"={tmp_path}/d"
  )
  source = str(fixtures / "mathvista_schema")
  run_in_shell(prepare.replace("/data/MathVista", source), checkout, 300)
  manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
  (testmini,) = pathlib.Path(source, "data").glob("testmini-*.parquet")
  assert manifest["counts"]["eval"] == parquet.read_metadata(testmini).num_rows
  assert set(manifest["counts"]) == {"eval", "test"}
  values = defaults.get_config()
  assert values.data.eval_split == "eval" and "eval_split" not in evaluate
  assert values.eval.num_problems >= 1000 and "num_problems" not in evaluate


@pytest.mark.nightly
def test_the_quickstart_runs_as_it_stands(checkout):
  """Every block, in order, in a fresh copy of the checkout."""
  for block in blocks("quickstart.md", "sh"):
    if "tensorboard" in block:
      check_server(block, checkout)
    else:
      output = run_in_shell(block, checkout, timeout=1800)
      assert "answer>blue" in output or "--question" not in block
      for noise in ("Traceback", "libtpu", "Unable to initialize backend"):
        assert noise not in output
  runs = checkout / "runs"
  assert json.loads((runs / "smoke" / "smoke.json").read_text())["steps"] == 100
  scores = json.loads((runs / "smoke" / "eval" / "scores.json").read_text())
  assert scores["weights"].endswith("runs/smoke@100")
  assert scores["accuracy"]["share"] > 0.8
  assert list((runs / "smoke" / "export").glob("*.safetensors"))
  preference = json.loads((runs / "preference" / "run.json").read_text())
  assert preference["end"]["exit_code"] == 0
  assert preference["end"]["step"] == 20


def check_server(command: str, checkout: pathlib.Path) -> None:
  """Starts a server and waits until it answers at the address it prints."""
  log = checkout / "server.txt"
  with log.open("wb") as file:
    process = subprocess.Popen(
      ["bash", "-c", f"exec {command}"],
      cwd=checkout,
      env=environment(checkout),
      stdout=file,
      stderr=subprocess.STDOUT,
    )
  try:
    deadline = time.monotonic() + 120
    while not (found := re.search(r"http://\S+/", log.read_text())):
      assert process.poll() is None, log.read_text()
      assert time.monotonic() < deadline, log.read_text()
      time.sleep(0.2)
    with urllib.request.urlopen(found[0]) as answer:
      assert b"TensorBoard" in answer.read()
  finally:
    process.kill()
    process.wait()
