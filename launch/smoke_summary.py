"""What a finished smoke run comes to: `smoke.json` and the closing line.

Reads the GRPO run's `metrics.jsonl` and knows nothing of how it was made.
Standard library only.

    python launch/smoke_summary.py WORKDIR WALL_SECONDS

`warm_start_accuracy` is `eval/accuracy` before the first update (step 0),
`final_accuracy` the last one, `steps` the last step. `wall_seconds` is that of
the invocation which finished the run, from after the installation; what an
interrupted one before it had spent is not in it.
"""

import json
import pathlib
import shlex
import sys


def summary(workdir: pathlib.Path, wall_seconds: int) -> dict[str, float]:
  """The four numbers of a finished run.

  Args:
    workdir: Of the GRPO run.
    wall_seconds: From after the installation to the end of training.

  Returns:
    What `smoke.json` holds.

  Raises:
    ValueError: If the held-out problems were not scored both before the first
      update and after a later one.
  """
  text = (workdir / "metrics.jsonl").read_text(encoding="utf-8")
  rows = [json.loads(line) for line in text.splitlines()]
  accuracies = {
    row["step"]: row["eval/accuracy"] for row in rows if "eval/accuracy" in row
  }
  if 0 not in accuracies or len(accuracies) < 2:
    raise ValueError(
      f"{workdir}/metrics.jsonl has eval/accuracy at steps "
      f"{sorted(accuracies)}; it needs step 0 and a later one. Evaluate with "
      "config.eval.every_steps no larger than config.train.num_steps."
    )
  return {
    "warm_start_accuracy": accuracies[0],
    "final_accuracy": accuracies[max(accuracies)],
    "wall_seconds": wall_seconds,
    "steps": max(row["step"] for row in rows),
  }


def main() -> None:
  """Writes `smoke.json` and says what is in it."""
  workdir = pathlib.Path(sys.argv[1])
  result = summary(workdir, int(sys.argv[2]))
  (workdir / "smoke.json").write_text(json.dumps(result, indent=2) + "\n")
  sys.stdout.write(
    f"Accuracy on held-out problems: {result['warm_start_accuracy']:.3f} "
    f"before GRPO, {result['final_accuracy']:.3f} after {result['steps']} "
    f"steps; {result['wall_seconds']} s in all. TensorBoard's files are in "
    f"{workdir}; to open them:\n"
    f"  .venv/bin/tensorboard --logdir={shlex.quote(str(workdir))}\n"
  )


if __name__ == "__main__":
  main()
