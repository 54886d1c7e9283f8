"""Writes `smoke.json` and the closing lines of a finished smoke run.

    python -m launch.smoke_summary WORKDIR WALL_SECONDS

The seconds count from the end of the installation, and only the last start of a
resumed run. A start that trains nothing leaves them as they were.
"""

import contextlib
import json
import pathlib
import shlex
import sys

from data_pipelines.storage import paths
from data_pipelines.text import untrusted
from grpo_tpu.observability import json_lines


def main(name: str, seconds: str) -> None:
  """Writes `smoke.json` and prints its content."""
  workdir = paths.to_path("WORKDIR", name)
  rows = json_lines.read_rows(workdir / "metrics.jsonl")
  given = {row["step"]: row.get("eval/accuracy") for _, row in rows if row}
  steps = max(given, default=0)
  known = {k: x for k, x in given.items() if isinstance(x, int | float)}
  if 0 not in known or len(known) < 2:
    raise ValueError(
      f"{name}/metrics.jsonl must have eval/accuracy at step 0 and at a later"
      f" step, but has it at {sorted(known)}; set config.eval.every_steps to at"
      " most config.train.num_steps."
    )
  path, wall_seconds = workdir / "smoke.json", int(seconds)
  # A first start has none; it may be the file of someone else.
  with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
    earlier = untrusted.parse_json(path.read_bytes(), "smoke.json")
    if earlier["steps"] == steps:
      wall_seconds = int(earlier["wall_seconds"])
  first, last = known[0], known[max(known)]
  result = {"warm_start_accuracy": first, "final_accuracy": last}
  result |= {"wall_seconds": wall_seconds, "steps": steps}
  paths.write_whole(path, json.dumps(result, indent=2).encode() + b"\n")
  tensorboard = pathlib.Path(sys.executable).with_name("tensorboard")
  view = [str(tensorboard), f"--logdir={name}"]
  # The fast loader reads only public buckets.
  view += ["--load_fast=false"] * paths.is_remote(name)
  sys.stdout.write(
    f"Eval accuracy: {first:.3f} before GRPO, {last:.3f} after {steps} steps,"
    f" in {wall_seconds} s.\n"
    f"View: {shlex.join(view)}  # http://localhost:6006/#custom_scalars\n"
  )


if __name__ == "__main__":
  main(*sys.argv[1:])
