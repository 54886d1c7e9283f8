"""A command line is checked without devices and without the files it names."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import notebooks

ROOT = pathlib.Path(__file__).resolve().parents[3]
V5E_16 = "--config=configs/gemma3_4b_v5e_16.py"
NAMED = ("--config.model.weights=hf:~/gemma", "--config.data.dir=/mnt/data")
# Only what locks/check.txt installs can be imported, as in .venv-check. Each
# command has a process of its own, but the imports are made once.
PROGRAM = """
import importlib.metadata, json, os, pathlib, re, sys

def canonical(name):
  return re.sub(r"[-_.]+", "-", name).lower()

lock = pathlib.Path("locks/check.txt").read_text()
locked = set(re.findall(r"^([\\w.-]+)==", lock, re.MULTILINE))
for module, names in importlib.metadata.packages_distributions().items():
  if locked.isdisjoint(map(canonical, names)):
    if module not in ("grpo_tpu", "data_pipelines"):
      sys.modules[module] = None
from grpo_tpu.planning import check

answers = []
for words in json.load(sys.stdin):
  reader, writer = os.pipe()
  if not (child := os.fork()):
    sys.stderr = os.fdopen(writer, "w")
    sys.argv = ["check", *words]  # Overrides of settings are read from it.
    code = check.main(sys.argv)
    sys.stderr.flush()
    os._exit(code)
  os.close(writer)
  said = os.fdopen(reader).read()
  answers.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said))
print(json.dumps(answers))
"""
ACCEPTED = {
  "trains": (V5E_16, *NAMED, "--topology=v5e:4x4"),
  "pays by a reward model": (
    *(V5E_16, *NAMED),
    "--config.rewards.models=(('run:/nowhere/pairs',1.0),)",
  ),
  "another format": (
    *(f"{V5E_16}:lora", NAMED[1]),
    "--config.model.weights=gguf:/mnt/x.gguf",
  ),
  "evaluates what the workdir has": (
    *(V5E_16, "--mode=evaluate"),
    "--topology=v5e:4x4",
  ),
}
ACCEPTED |= {
  f"{name}, command {index}": words
  for name in notebooks.NAMES
  for index, words in enumerate(notebooks.commands(name))
}
REFUSED = {
  "optimizer.lr": (V5E_16, *NAMED, "--config.optimizer.lr=1"),
  "'confg'": (V5E_16, *NAMED, "--confg=1"),
  "must be full or lora": (f"{V5E_16}:lor", *NAMED),
  "configs/nowhere.py": ("--config=configs/nowhere.py",),
  "model.weights ('x')": (V5E_16, "--config.model.weights=x", NAMED[1]),
  "data.dir ('')": (V5E_16, NAMED[0]),
  "model.weights ('')": (V5E_16, NAMED[1]),
  "(1 * 1 * 1) must equal the 16 devices of v5e:4x4; set mesh": (
    *("--config=configs/smoke.py", "--topology=v5e:4x4"),
  ),
  "(1 * 16 * 8) must equal the 16 devices of v5e:4x4; set mesh": (
    *("--config=configs/gemma3_27b_v5p_256.py", *NAMED),
    "--topology=v5e:4x4",
  ),
}


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str]]:
  """The exit code and the error of each check, without any device."""
  commands = ACCEPTED | REFUSED
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "no_such_device", "HOME": "/nowhere"},
    input=json.dumps([["--workdir=/nowhere", *x] for x in commands.values()]),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return dict(zip(commands, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_command_is_accepted_though_its_files_are_elsewhere(answers, case):
  assert answers[case] == [0, ""]


@pytest.mark.parametrize("rule", REFUSED)
def test_what_the_program_would_refuse_is_refused_in_words(answers, rule):
  code, said = answers[rule]
  assert code == 64, said
  assert rule in said
