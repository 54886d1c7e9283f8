"""MathVista's own programs read a file of --mode=evaluate, without a model.

$MATHVISTA is a clone of github.com/lupantech/MathVista, bare or not.
"""

import json
import os
import subprocess
import sys

import pytest

from data_pipelines.scoring import score_file
from tests.grpo_tpu import scripted

# Stands for the modules that the programs import but do not need here. The
# "language model" answers with what stands in the last tag.
DRIVER = """
import logging, runpy, sys, types
import pandas
from rapidfuzz.distance import Levenshtein

def module(name, **attributes):
  sys.modules[name] = types.ModuleType(name)
  vars(sys.modules[name]).update(attributes)

class Client:
  def __init__(self, **_): self.chat = self.completions = self
  def create(self, messages, **_):
    prompt = messages[0]["content"][-1]["text"]
    answer = prompt.rpartition("<answer>")[2].partition("</answer>")[0]
    made = types.SimpleNamespace
    message = made(content=answer or "none")
    return made(choices=[made(message=message)])

module("openai", AzureOpenAI=Client, OpenAI=Client)
for name in ("openai.types", "openai.types.chat", "rich"):
  module(name)
sys.modules["openai.types.chat"].ChatCompletionContentPartParam = dict
sys.modules["openai.types.chat"].ChatCompletionMessageParam = dict
module("rich.logging", RichHandler=lambda **_: logging.NullHandler())
module("cv2")
module("word2number", w2n=None)
module("tqdm", tqdm=lambda items, **_: items)
module("Levenshtein", distance=Levenshtein.distance)
module("datasets", load_dataset=lambda *_, **__: [])

# The program reads a column by position, which pandas 3 no longer does.
by_label = pandas.Series.__getitem__
pandas.Series.__getitem__ = lambda self, key: (
  self.iloc[key] if isinstance(key, int) else by_label(self, key)
)
program, sys.argv = sys.argv[1], sys.argv[1:]
sys.path.insert(0, ".")
runpy.run_path(program, run_name="__main__")
"""
COLUMNS = {"language": "english", "category": "general-vqa", "grade": "x"}
COLUMNS |= {"task": "counting", "context": "scene"}
COLUMNS |= {"official_rule": "mathvista"}


@pytest.fixture
def program(tmp_path):
  """Runs one of the programs in a copy of the clone."""
  clone = os.environ.get("MATHVISTA", "")
  if not clone:
    pytest.skip("MATHVISTA names no clone of github.com/lupantech/MathVista")
  folder = tmp_path / "MathVista"
  folder.mkdir()
  command = ["git", "-C", clone, "archive", "HEAD", "evaluation", "models"]
  files = subprocess.run([*command, "utilities.py"], check=True, stdout=-1)
  subprocess.run(["tar", "x"], cwd=folder, input=files.stdout, check=True)
  (folder / "driver.py").write_text(DRIVER)
  names = ("API_ENDPOINT", "API_KEY", "API_VERSION", "MODEL")
  keys = {f"AZURE_OPENAI_{name}": "none" for name in names}

  def run(name, *arguments):
    done = subprocess.run(
      [sys.executable, "driver.py", f"evaluation/{name}.py", *arguments],
      cwd=folder,
      env=os.environ | keys,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr

  return run


@pytest.mark.nightly
def test_the_official_programs_read_our_file(tmp_path, program):
  tokenizer = scripted.make_tokenizer(tmp_path)
  completions = {f"p{i}": [x[2]] for i, x in enumerate(scripted.SCRIPT)}
  run = scripted.make_run(tokenizer, completions)
  result = run.evaluate(scripted.batches_of(tokenizer, batch_size=4))
  written = {x.record["pid"]: x.record for x in result.greedy}
  for pid, record in written.items():
    assert "extraction" not in record
    if not pid.startswith("unreadable"):
      record["metadata"] |= COLUMNS
  path = tmp_path / "output.json"
  path.write_text(json.dumps(written))
  program("extract_answer", f"--results_file_path={path}")
  program(
    "calculate_score",
    f"--output_dir={tmp_path}",
    "--output_file=output.json",
    "--score_file=official.json",
  )
  official = json.loads((tmp_path / "official.json").read_text())["average"]
  assert official["total"] == len(scripted.SCRIPT)
  # What was not asked, or was cut off, is wrong to both.
  assert official["correct"] == len(scripted.RIGHT)
  labels = {
    pid: record["true_false"]
    for pid, record in json.loads(path.read_text()).items()
  }
  assert labels == {x: y["strict_true_false"] for x, y in written.items()}
  # With the extractions of the program, our official column is its number.
  scores = tmp_path / "scores.json"
  score_file.score_file(str(path), scores=str(scores))
  found = json.loads(scores.read_text())
  assert found["stored_extractions"] == len(scripted.SCRIPT)
  whole = found["rows"][0]
  assert whole["official"] == whole["stored"]
  assert whole["official"]["right"] == official["correct"]
