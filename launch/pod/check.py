"""Checks what a run asks for before anything is created or started.

The program of the commit that will run reads the config and the flags, in a
process of its own on this machine.
"""

import logging
import os
import pathlib
import subprocess
import tempfile

from launch.pod import gcloud, shapes, workers
from launch.pod import settings as pod_settings
from launch.pod.exits import Exit, Failure

_FIND_PYTHON = 'source "$0"; ensure_check_venv; printf %s "$venv/bin/python"'


def check(settings: pod_settings.Settings, job: workers.Job) -> None:
  """Checks config and flags, and the mesh against ACCELERATOR_TYPE.

  Raises:
    Failure: The program would refuse them, or the check could not be made.
  """
  if settings.image and not workers.is_committed(job.config):
    logging.warning(
      "Not checked: no commit of this checkout has %s. A wrong setting ends the"
      " run with 64.",
      job.config,
    )
    return
  words = [*job.words, "--workdir=/workdir"]
  shape = shapes.SHAPES.get(settings.accelerator_type)
  if shape is None:
    logging.warning(
      "Not checked: the mesh, because no table has ACCELERATOR_TYPE %s.",
      settings.accelerator_type,
    )
  else:
    words.append(_topology(settings, shape))
  code, reason = _run(words, "grpo_tpu.planning.check")
  if code == Exit.BAD_REQUEST:
    where = f"ACCELERATOR_TYPE ({settings.accelerator_type})"
    raise Failure(
      Exit.BAD_REQUEST,
      f"The program would refuse this run on {where}: {reason}",
    )
  if code:
    raise Failure(
      Exit.BAD_REQUEST,
      f"The check of the run failed with exit code {code}: {reason}\nStart the"
      " run with --no-check to go without.",
    )


def check_memory(
  settings: pod_settings.Settings, job: workers.Job
) -> tuple[str, str]:
  """Plans the run with libtpu; "ok", "WRONG" or "not tested", and why."""
  shape = shapes.SHAPES.get(settings.accelerator_type)
  find = [_python(), "-c", "import libtpu"]
  if shape is None or subprocess.run(find, capture_output=True).returncode:
    return "not tested", (
      "memory: libtpu is not installed here; docs/plan.md says how to plan"
    )
  with tempfile.TemporaryDirectory() as folder:
    words = [*job.words, f"--workdir={folder}", "--mode=plan"]
    words.append("--config.model.weights=random:0")  # Their files may be away.
    code, reason = _run([*words, _topology(settings, shape)], "grpo_tpu.main")
  return ("WRONG", f"memory: {reason}") if code else ("ok", "memory of a chip")


def _topology(settings: pod_settings.Settings, shape: shapes.Shape) -> str:
  several = f"*{settings.num_slices}" * (settings.num_slices != "1")
  return f"--topology={shape.slice_name}{several}"


def _run(words: list[str], module: str) -> tuple[int, str]:
  """Runs a module in the files of the commit; the exit code and the error."""
  python = _python()
  with tempfile.TemporaryDirectory() as folder:
    code = pathlib.Path(folder, "code")
    workers.clone(code)
    result = subprocess.run(
      [python, "-P", "-m", module, *words],
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
  # What it prints to stderr is for the user.
  made = subprocess.run(
    ["bash", "-euo", "pipefail", "-c", _FIND_PYTHON, script],
    stdout=subprocess.PIPE,
    text=True,
  )
  if made.returncode:
    raise Failure(
      Exit.BAD_REQUEST,
      "The run cannot be checked without the environment above; start it"
      " unchecked with --no-check.",
    )
  return made.stdout
