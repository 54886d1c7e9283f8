"""Runs the smoke configuration for minutes and watches what grows.

  python benchmarks/soak.py [--minutes=8] [--workdir=DIR] [--bare_saves=300]

The run saves and writes samples every 2 steps. Its memory, threads, open files
and children are read from /proc after each step, and at the end it gets
SIGTERM. Then a loop that only calls Orbax saves arrays of the same shapes, in a
process of its own. Prints the slope of the second half of each, per save, the
difference, which is the run's own, and all of it as one line of JSON.

RSS counts files that are mapped too; "anonymous" is what the program allocated.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import psutil
from absl import app, flags, logging

ROOT = pathlib.Path(__file__).resolve().parents[1]
_EVERY = 2  # Steps between saves.
_MINUTES = flags.DEFINE_float("minutes", 8.0, "Length of the run.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run, new or empty; deleted if not given."
)
_SAVES = flags.DEFINE_integer("bare_saves", 300, "Saves by Orbax alone.")
_BARE = flags.DEFINE_string("bare", None, "Checkpoint to imitate; internal.")
_SETTINGS = (
  f"--config.checkpoint.every_steps={_EVERY}",
  f"--config.samples.every_steps={_EVERY}",
  "--config.eval.every_steps=20",
  "--config.eval.num_problems=64",
  "--config.eval.batch_size=64",
  "--config.data.prompts_per_step=16",
  "--config.rollout.num_generations=4",
  "--config.rewards.num_workers=2",
  "--config.rewards.custom=('soak_reward:zero',)",
  "--config.rewards.custom_weights=(0.1,)",
  "--config.optimizer.schedule=constant",
  "--config.train.num_steps=1000000",
)

# A user's reward, so that the run starts its worker processes.
_REWARD = """
def zero(completions, problems):
  return [0.0] * len(completions)
"""

type Row = dict[str, int]


def usage(pid: int) -> Row:
  """Memory in kB, threads, open files and children of a process."""
  folder = pathlib.Path(f"/proc/{pid}")
  lines = (folder / "status").read_text().splitlines()
  status = dict(line.split(":", 1) for line in lines)
  return {
    "rss": int(status["VmRSS"].split()[0]),
    "anonymous": int(status["RssAnon"].split()[0]),
    "threads": int(status["Threads"]),
    "files": len(os.listdir(folder / "fd")),
    "children": len(psutil.Process(pid).children()),
  }


def watch(workdir: pathlib.Path, minutes: float) -> tuple[list[Row], int]:
  """Runs for that long after step 1; the usage after steps, the exit code."""
  command = [sys.executable, "-m", "grpo_tpu", "--config=configs/smoke.py"]
  log = workdir.with_name(f"{workdir.name}.log")
  (workdir.parent / "soak_reward.py").write_text(_REWARD)
  paths = [str(workdir.parent), os.environ.get("PYTHONPATH", "")]
  with log.open("wb") as file:
    process = subprocess.Popen(
      [*command, f"--workdir={workdir}", *_SETTINGS],
      cwd=ROOT,
      env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
      stdout=file,
      stderr=subprocess.STDOUT,
    )
  rows: list[Row] = []
  deadline = time.monotonic() + 3600
  try:
    while time.monotonic() < deadline and process.poll() is None:
      step = newest_step(workdir / "metrics.jsonl")
      if step and (not rows or step > rows[-1]["step"]):
        if not rows:
          deadline = time.monotonic() + 60 * minutes
        rows.append({"step": step} | usage(process.pid))
      time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=300)
  finally:
    process.kill()
  if len(rows) < 10:
    raise RuntimeError(
      f"the run ended with {code} after {len(rows)} steps; see {log}:\n"
      + log.read_text()[-4000:]
    )
  return rows, code


def newest_step(path: pathlib.Path) -> int:
  """The step of the last whole line; 0 without one."""
  try:
    with path.open("rb") as file:
      file.seek(max(0, path.stat().st_size - 100_000))
      lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"])
  except (OSError, ValueError, IndexError):
    return 0


def bare_rows(checkpoint: str, saves: int) -> list[Row]:
  """The usage of this process after each save that Orbax makes alone."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp
  from etils import epath

  record: Any = ocp.JsonCheckpointHandler().restore(
    epath.Path(checkpoint) / "meta"
  )
  tree = {}
  for name, leaf in record["leaves"].items():
    dtype, _, shape = leaf.removesuffix("]").partition("[")
    sizes = tuple(int(size) for size in shape.split(",") if size)
    if not dtype.startswith("key"):
      tree[name] = jax.device_put(np.zeros(sizes, dtype))
  writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    for save in range(1, saves + 1):
      path = f"{folder}/{save}"
      items = {
        "state": ocp.args.PyTreeSave(tree),
        "meta": ocp.args.JsonSave(record),
      }
      writer.save(path, args=ocp.args.Composite(**items))
      writer.wait_until_finished()
      shutil.rmtree(path)
      rows.append({"step": save} | usage(os.getpid()))
  return rows


def slope(rows: list[Row], name: str) -> float:
  """Growth per step over the second half, by least squares."""
  late = rows[len(rows) // 2 :]
  mean_x = sum(row["step"] for row in late) / len(late)
  mean_y = sum(row[name] for row in late) / len(late)
  spread = sum((row["step"] - mean_x) ** 2 for row in late)
  return (
    sum((row["step"] - mean_x) * (row[name] - mean_y) for row in late) / spread
  )


def bounds(values: Iterable[int]) -> list[int]:
  """The least and the largest value."""
  values = list(values)
  return [min(values), max(values)]


def report(rows: list[Row], bare: list[Row], code: int) -> dict[str, Any]:
  """The figures; memory in kB."""
  result: dict[str, Any] = {"exit_code": code, "steps": rows[-1]["step"]}
  for name in ("rss", "anonymous"):
    of_run, of_orbax = slope(rows, name) * _EVERY, slope(bare, name)
    result[f"{name}_kb_per_save"] = round(of_run, 1)
    result[f"{name}_kb_per_save_orbax"] = round(of_orbax, 1)
    result[f"{name}_kb_per_save_without_orbax"] = round(of_run - of_orbax, 1)
    result[f"{name}_kb"] = [rows[0][name], rows[-1][name]]
  later = rows[len(rows) // 2 :]
  for name in ("threads", "files", "children"):
    result[name] = bounds(row[name] for row in later)
  return result


def main(_: Any) -> None:
  """Runs, imitates, prints."""
  if _BARE.value:
    logging.set_verbosity(logging.WARNING)
    print(json.dumps(bare_rows(_BARE.value, _SAVES.value)))
    return
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(_WORKDIR.value or f"{folder}/run").absolute()
    workdir.parent.mkdir(parents=True, exist_ok=True)
    rows, code = watch(workdir, _MINUTES.value)
    checkpoints = sorted((workdir / "checkpoints").glob("[0-9]" * 8))
    command = [sys.executable, __file__, f"--bare={checkpoints[-1]}"]
    command += [f"--bare_saves={_SAVES.value}"]
    output = subprocess.run(
      command,
      stdout=subprocess.PIPE,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      check=True,
    ).stdout
  result = report(rows, json.loads(output.splitlines()[-1]), code)
  print(f"{'step':>8} {'RSS MB':>8} {'anon MB':>8} {'threads':>8} {'files':>6}")
  for row in rows[:: max(1, len(rows) // 10)]:
    memory = f"{row['rss'] / 1024:8.0f} {row['anonymous'] / 1024:8.0f}"
    print(f"{row['step']:8} {memory} {row['threads']:8} {row['files']:6}")
  for name, value in result.items():
    print(f"{name}: {value}")
  print(json.dumps(result))


if __name__ == "__main__":
  app.run(main)
