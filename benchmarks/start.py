"""Prints the CPU-seconds of a warm start, part by part, to the end of step 1.

    python benchmarks/start.py [--starts=3] [--folder=DIR] [--config.NAME=VALUE]

Prepares the data of the smoke configuration and starts it once, to fill the
compile cache; DIR keeps both for the next call. Then prints a table of medians
and a line of JSON. Background threads count in the part that is under way.
"""

import argparse
import functools
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

from grpo_tpu import main, modes

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = (
  *("--source=synthetic", "--num_problems=12000", "--difficulty=1"),
  *("--kinds=bar_max,color", "--image_size=48", "--multi_choice_share=0"),
  *("--max_options=4", "--eval_fraction=0.1", "--vocab_size=1024"),
)
PARTS = (
  *("imports", "data", "devices and weights", "sampler's programs"),
  *("first evaluation", "first checkpoint", "rollout", "scores", "update"),
)


def run_child(folder: str, arguments: list[str]) -> None:
  """Starts the program in this process; writes when each part ended."""
  ends = []

  def stamp(owner, name: str, *, at_start: bool = False) -> None:
    call = getattr(owner, name)

    @functools.wraps(call)
    def timed(*args, **options):
      at_start and ends.append((time.process_time(), time.perf_counter()))
      result = call(*args, **options)
      ends.append((time.process_time(), time.perf_counter()))
      return result

    setattr(owner, name, timed)

  def open_mode(*args):
    from data_pipelines import dataset
    from grpo_tpu.train import trainer

    stamp(dataset, "open_dataset", at_start=True)
    stamp(trainer.Trainer, "compile_ahead", at_start=True)
    stamp(trainer.Trainer, "evaluate")
    stamp(trainer.Trainer, "collect", at_start=True)
    stamp(trainer.Trainer, "score")
    stamp(trainer.Trainer, "update")
    return opened(*args)

  opened, start = modes.open_mode, time.perf_counter()
  modes.open_mode = open_mode
  sys.argv = ["start", "--config=configs/smoke.py", *arguments]
  try:
    main.cli()
  finally:
    seconds = [(cpu, wall - start) for cpu, wall in ends[: len(PARTS)]]
    (pathlib.Path(folder) / "ends.json").write_text(json.dumps(seconds))


def start(folder: pathlib.Path, settings: list[str]) -> list[tuple]:
  """CPU and wall seconds at the end of each part of one start."""
  shutil.rmtree(folder / "run", ignore_errors=True)
  given = [
    *(f"--workdir={folder / 'run'}", f"--config.data.dir={folder / 'data'}"),
    *("--config.train.num_steps=2", "--config.eval.every_steps=2"),
    f"--config.compilation_cache_dir={folder / 'compiled'}",
  ]
  command = [sys.executable, __file__, f"--child={folder}", *given, *settings]
  subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
  return json.loads((folder / "ends.json").read_text())


def report(folder: pathlib.Path, starts: int, settings: list[str]) -> None:
  """Prints the table and the line of JSON."""
  data = f"--data_dir={folder / 'data'}"
  prepare = [sys.executable, "-m", "data_pipelines.prepare", *DATA, data]
  subprocess.run(prepare, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
  start(folder, settings)
  runs = [start(folder, settings) for _ in range(starts)]
  medians = [
    tuple(map(statistics.median, zip(*ends, strict=True)))
    for ends in zip(*runs, strict=True)
  ]
  before = 0.0
  for name, (cpu, _) in zip(PARTS, medians, strict=True):
    print(f"{name:20} {cpu - before:6.2f} CPU-s")
    before = cpu
  total, wall = medians[-1]
  print(f"{'total':20} {total:6.2f} CPU-s, {wall:.2f} s")
  print(json.dumps({"start_cpu_seconds": total, "start_seconds": wall}))


if __name__ == "__main__":
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument("--starts", type=int, default=3)
  flags.add_argument("--folder", type=pathlib.Path)
  flags.add_argument("--child", help=argparse.SUPPRESS)
  args, rest = flags.parse_known_args()
  if args.child:
    run_child(args.child, rest)
  else:
    with tempfile.TemporaryDirectory() as temporary:
      report(args.folder or pathlib.Path(temporary), args.starts, rest)
