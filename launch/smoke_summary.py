"""Writes `smoke.json` and the closing lines of a finished smoke run.

Reads only the GRPO run's `metrics.jsonl`. Needs only the standard library.

    python launch/smoke_summary.py WORKDIR WALL_SECONDS

`warm_start_accuracy` is `eval/accuracy` before the first update (step 0),
`final_accuracy` the last one, `steps` the last step. `wall_seconds` counts from
the end of the installation, and only the last start of a resumed run. A start
that trains nothing leaves it as it was.
"""

import json
import pathlib
import shlex
import sys


def main() -> None:
  """Writes `smoke.json` and prints its content."""
  workdir = pathlib.Path(sys.argv[1])
  rows = _read_rows(workdir / "metrics.jsonl")
  accuracies = {
    row["step"]: row["eval/accuracy"]
    for row in rows
    if isinstance(row.get("eval/accuracy"), int | float)
  }
  if 0 not in accuracies or len(accuracies) < 2:
    raise ValueError(
      f"{workdir}/metrics.jsonl must have eval/accuracy at step 0 and at a"
      f" later step, but has it at {sorted(accuracies)}; set"
      " config.eval.every_steps to at most config.train.num_steps."
    )
  steps = max(row["step"] for row in rows)
  path = workdir / "smoke.json"
  result = {
    "warm_start_accuracy": accuracies[0],
    "final_accuracy": accuracies[max(accuracies)],
    "wall_seconds": _wall_seconds(path, steps),
    "steps": steps,
  }
  path.write_text(json.dumps(result, indent=2) + "\n")
  tensorboard = pathlib.Path(sys.executable).with_name("tensorboard")
  sys.stdout.write(
    f"Eval accuracy: {result['warm_start_accuracy']:.3f} before GRPO, "
    f"{result['final_accuracy']:.3f} after {result['steps']} steps, in "
    f"{result['wall_seconds']} s.\n"
    f"View: {shlex.join([str(tensorboard), f'--logdir={workdir}'])}"
    "  # http://localhost:6006/#custom_scalars\n"
  )


def _wall_seconds(path: pathlib.Path, steps: int) -> int:
  """The seconds of the start that made the last of these steps."""
  try:
    earlier = json.loads(path.read_bytes())
    if earlier["steps"] == steps:
      return int(earlier["wall_seconds"])
  except (OSError, ValueError, RecursionError, TypeError, KeyError):
    pass  # The first start, or a file of someone else.
  return int(sys.argv[2])


def _read_rows(path: pathlib.Path) -> list[dict]:
  """The metrics of each step; skips lines that others wrote into the file."""
  rows = []
  for line in path.read_bytes().splitlines():
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(row, dict) and isinstance(row.get("step"), int):
      rows.append(row)
  return rows


if __name__ == "__main__":
  main()
