"""Checks what a run asks for before anything is created or started.

The program of the commit that will run reads the config and the flags, in a
process of its own on this machine.
"""

import logging
import os
import pathlib
import subprocess
import tempfile
from collections.abc import Sequence

from launch.pod import gcloud, shapes, workers
from launch.pod import settings as pod_settings
from launch.pod.exits import Exit, Failure

_FIND_PYTHON = 'source "$0"; ensure_check_venv; printf %s "$venv/bin/python"'


def check(settings: pod_settings.Settings, job: workers.Job) -> None:
  """Fails if the program would refuse the command, or its mesh the slice."""
  kind = f"ACCELERATOR_TYPE ({settings.accelerator_type})"
  if settings.image and not workers.is_committed(job.config):
    logging.warning("Not checked: no commit here has %s.", job.config)
    return
  topology = _topology(settings)
  if not topology:
    logging.warning("Not checked: the mesh; no table has %s.", kind)
  words = [*job.words, "--workdir=/workdir", *topology]
  code, reason = _run("grpo_tpu.planning.check", words)
  message = f"The check of the run failed with exit code {code}: {reason}"
  message += "\nStart the run with --no-check to go without."
  if code == Exit.BAD_REQUEST:
    message = f"The program would refuse this run on {kind}: {reason}"
  if code:
    raise Failure(Exit.BAD_REQUEST, message)


def check_memory(
  settings: pod_settings.Settings, job: workers.Job
) -> tuple[str, str]:
  """Plans the run with libtpu; "ok", "WRONG" or "not tested", and why."""
  topology = _topology(settings)
  find = [_python(), "-c", "import libtpu"]
  if not topology or subprocess.run(find, capture_output=True).returncode:
    return "not tested", (
      "memory: libtpu is not installed here; docs/plan.md says how to plan"
    )
  with tempfile.TemporaryDirectory() as folder:
    words = [*job.words, f"--workdir={folder}", "--mode=plan", *topology]
    words.append("--config.model.weights=random:0")  # Their files may be away.
    code, reason = _run("grpo_tpu.main", words)
  return ("WRONG", f"memory: {reason}") if code else ("ok", "memory of a chip")


def _topology(settings: pod_settings.Settings) -> list[str]:
  """The flag that names the slices; none if no table has their type."""
  shape = shapes.SHAPES.get(settings.accelerator_type)
  several = f"*{settings.num_slices}" * (settings.num_slices != "1")
  return [f"--topology={shape.slice_name}{several}"] if shape else []


def _run(module: str, words: Sequence[str]) -> tuple[int, str]:
  """Runs a module in the files of the commit; the exit code and the error."""
  with tempfile.TemporaryDirectory() as folder:
    code = pathlib.Path(folder, "code")
    workers.clone(code)
    result = subprocess.run(
      [_python(), "-P", "-m", module, *words],
      cwd=code,
      env=os.environ | {"PYTHONPATH": str(code)},
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      errors="replace",
    )
  return result.returncode, gcloud.error_tail(result.stderr)


def _python() -> str:
  """A Python that can import the program's settings; makes it if necessary."""
  if python := os.environ.get("GRPO_TPU_PYTHON"):
    return python
  script = str(workers.ROOT / "launch" / "setup.sh")
  call = ["bash", "-euo", "pipefail", "-c", _FIND_PYTHON, script]
  # What it prints to stderr is for the user.
  made = subprocess.run(call, stdout=subprocess.PIPE, text=True)
  if made.returncode:
    message = "Without the environment above, start the run with --no-check."
    raise Failure(Exit.BAD_REQUEST, message)
  return made.stdout
