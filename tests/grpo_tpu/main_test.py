"""The command line: help, and errors before any device is touched."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from grpo_tpu.config import defaults, usage
from grpo_tpu.distributed import fingerprint

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = "--config=configs/smoke.py"
WORKDIR = "--workdir=WORKDIR"


def refusal(tmp_path: pathlib.Path, *arguments: str) -> str:
  """The log of a program that must exit with 64 and leave no files."""
  workdir = tmp_path / "run"
  result = subprocess.run(
    [sys.executable, "-m", "grpo_tpu.main"]
    + [x.replace("WORKDIR", str(workdir)) for x in arguments],
    cwd=ROOT,
    # With this, a program that asks for devices fails, and not with 64.
    env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 64, result.stderr
  assert "Traceback" not in result.stderr
  # Nothing else, as absl's complaint that it is too early to log.
  error, *commands, what_next = result.stderr.splitlines()
  assert all(line.startswith(("  ", "data.dir")) for line in commands)
  assert [x[0] for x in (error, what_next)] == ["E", "W"]
  assert "Next: fix what the error names and run" in what_next
  assert what_next.endswith("(exit code 64).")
  assert not result.stdout
  assert not workdir.exists()
  return result.stderr


@pytest.mark.parametrize(
  ("arguments", "named"),
  [
    ([CONFIG, WORKDIR, "--wrokdir=x"], ["wrokdir"]),
    (
      [CONFIG, WORKDIR, "--config.train.num_stepz=7"],
      ["--config.train.num_stepz=7: ", "did you mean train.num_steps?"],
    ),
    (
      [CONFIG, WORKDIR, "--config.train.num_steps=many"],
      ["--config.train.num_steps=many", "int"],
    ),
    (["--config=configs/no_such.py", WORKDIR], ["configs/no_such.py"]),
    ([CONFIG], ["--workdir"]),
    (
      [CONFIG, "--workdir=s3://bucket/run"],
      ["--workdir ('s3://bucket/run')", "or gs://BUCKET/PATH", "copy it to"],
    ),
    (
      [CONFIG, WORKDIR, "--config.rollout.temperature=0.0"],
      ["rollout.temperature (0.0) must be above 0", "rollout.temperature=1.0"],
    ),
    (
      [CONFIG, WORKDIR, "--config.data.dir=/no/such/dir"],
      ["data.dir ('/no/such/dir')", "data_pipelines.prepare"],
    ),
    (
      [
        CONFIG,
        WORKDIR,
        "--config.rewards.custom=('math:no_such',)",
        "--config.rewards.custom_weights=(1.0,)",
      ],
      ["rewards.custom ('math:no_such')", "Correct the name"],
    ),
    (
      [CONFIG, WORKDIR, "--config.model.weights=gguf:/no/such.gguf"],
      ["model.weights ('gguf:/no/such.gguf') must be a checkpoint"],
    ),
    (
      ["--config=configs/smoke.py:warmup", WORKDIR],
      ["stage ('warmup') must be one of"],
    ),
    (
      ["--config=configs/gemma3_4b_v5e_16.py", WORKDIR],
      ["hf download google/gemma-3-4b-it", "prepare --source=PATH"],
    ),
    (
      [CONFIG, WORKDIR, "--mode=export"],
      ["/run') must hold a run to export"],
    ),
    (
      [CONFIG, WORKDIR, "--mode=evaluate"],
      ["/run') must hold a run to evaluate"],
    ),
    (
      [CONFIG, WORKDIR, "--config.model.weights=google/gemma-3-1b-it"],
      ["hf download google/gemma-3-1b-it --local-dir gemma-3-1b-it"],
    ),
    (
      [CONFIG, WORKDIR, "--question=What?"],
      ["--question ('What?') must go with --mode=answer", "--mode=train"],
    ),
    (
      [CONFIG, "--mode=answer", "--num_processes=2", "--process_id=0"]
      + ["--coordinator_address=127.0.0.1:1"],
      ["--num_processes (2) must be 1 with --mode=answer"],
    ),
    ([CONFIG, "--workdir="], ["--workdir ('') must name a file or a folder"]),
    ([CONFIG, "--workdir=" + "n" * 300], ["--workdir ('nnn", "too long"]),
    (["--config=", WORKDIR], ["--config ('') must name a file"]),
    (["--config=/dev/zero", WORKDIR], ["--config ('/dev/zero') must name"]),
    (
      [CONFIG, WORKDIR, "--config.mesh.tensor=1000000000"],
      ["mesh.tensor (1000000000) must be at least 1 and at most 65536"],
    ),
  ],
  ids=[
    "unknown flag",
    "unknown setting",
    "wrong type",
    "no such config",
    "no workdir",
    "a bucket for a workdir",
    "rule broken",
    "no such data",
    "no such reward",
    "no such weights",
    "unknown stage",
    "no weights and data",
    "nothing to export",
    "nothing to evaluate",
    "a name on a hub",
    "a flag of another mode",
    "several processes to answer",
    "empty workdir",
    "long workdir",
    "empty config",
    "a device for a config",
    "huge mesh",
  ],
)
def test_a_user_error_exits_64_before_devices_start(tmp_path, arguments, named):
  log = refusal(tmp_path, *arguments)
  for words in named:
    assert words in log


def test_training_on_mathvista_is_refused_with_64(tmp_path):
  manifest = {
    "terms": "mathvista",
    "counts": {"train": 1, "eval": 1, "test": 1},
    "tokenizer": {"vocab_size": 512, "fingerprint": "x"},
    "fingerprint": "y",
    "files": {},
  }
  (tmp_path / "data").mkdir()
  (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
  data = f"--config.data.dir={tmp_path / 'data'}"
  named = "data.accept_mathvista_training_terms (False) must be True"
  assert named in refusal(tmp_path, CONFIG, WORKDIR, data)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True
  )


@pytest.mark.parametrize("module", ["grpo_tpu", "grpo_tpu.main"])
@pytest.mark.parametrize("arguments", [["--help"], [CONFIG, "-h"], []])
def test_help_is_the_page_of_the_settings(module, arguments):
  result = run("-m", module, *arguments)
  page = (ROOT / "docs" / "settings.md").read_text()
  assert (result.returncode, result.stdout, result.stderr) == (0, page, "")


def test_help_has_every_setting_with_its_default_and_choices():
  page = " ".join(usage.text().split())
  values = fingerprint.flatten(defaults.get_config().to_dict())
  assert all(f"- `{name}`: (default " in page for name in values)
  assert "`seed`: (default 0) Seed" in page
  assert "`model.remat`: (default 'full', choices none, dots, full, " in page
  assert "`objective.surrogate`: (default None, choices clip, cispo, " in page
  assert "`optimizer.b1`: (default 0.9, at least 0 and below 1) Decay" in page


def test_a_setting_can_become_none_and_a_value_again():
  code = (
    "import sys\n"
    "from grpo_tpu.config import flags, schema\n"
    "flags.parse(sys.argv)\n"
    "config = schema.Config.from_config_dict(flags.CONFIG.value)\n"
    "print(config.objective.dual_clip, config.objective.beta,\n"
    "      config.model.reference_dtype, flags.has_override('model.name'))"
  )
  result = run(
    *("-c", code, CONFIG, WORKDIR, "--config.objective.dual_clip=2.0"),
    *("--config.objective.beta=None", "--config.objective.beta=0.25"),
    *("--config.objective.dual_clip=None", "--config.model.name=tiny"),
    "--config.model.reference_dtype=None",
  )
  assert result.stdout == "None 0.25 None True\n", result.stderr


@pytest.mark.parametrize(
  ("words", "question"),
  [
    (["evaluate"], "did you mean --mode=evaluate?"),
    (["--objective.beta=0"], "did you mean --config.objective.beta?"),
    (["--wrkdir=x"], "Did you mean: workdir"),
  ],
)
def test_a_wrong_flag_exits_64_with_a_question(tmp_path, words, question):
  assert question in refusal(tmp_path, CONFIG, WORKDIR, *words)


def test_the_settings_are_read_without_jax():
  """So that help and refusals come at once."""
  names = "{'jax', 'optax', 'orbax', 'grain', 'tensorflow'}"
  code = "import sys, grpo_tpu.main; from grpo_tpu.config import usage; "
  code += f"usage.text(); assert {names}.isdisjoint(sys.modules)"
  result = run("-c", code)
  assert result.returncode == 0, result.stderr
