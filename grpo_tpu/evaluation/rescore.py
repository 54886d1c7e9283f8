"""Scores the saved completions of a run again, with other rewards if wanted.

    python -m grpo_tpu.evaluation.rescore --config=configs/base.py \\
      --data_dir=DIR --samples=WORKDIR/samples \\
      --config.rewards.format=0.5

Prints the mean and standard deviation of each reward, and how many totals
differ from the saved ones; with the rewards of the run none differs. Uses no
device. The exit codes are those of `main`: 1 if the failures of a reward would
end a run.
"""

import dataclasses
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from data_pipelines import records, validation
from data_pipelines.sources import mixtures, readers
from data_pipelines.storage import paths
from data_pipelines.text import flags as command_flags
from data_pipelines.text import untrusted
from grpo_tpu.config import schema as run_config
from grpo_tpu.observability import sample_files
from grpo_tpu.rewards import scoring
from grpo_tpu.rewards.settings import RewardConfig


@dataclasses.dataclass(frozen=True)
class Result:
  """The new rewards of saved completions."""

  # The saved rows with the new rewards, answers and validity.
  rows: list[dict[str, Any]]
  table: str  # The mean and standard deviation of each reward.
  num_changed: int  # Totals that differ from the saved ones in any digit.
  num_valid: int  # Rows on which no reward failed; only these are compared.
  error: str  # Why the failures would end a run, or "".


def rescore(
  rows: Sequence[Mapping[str, Any]],
  problems: Mapping[str, records.Problem],
  config: RewardConfig,
) -> Result:
  """Computes the rewards of rows of `samples/*.parquet`."""
  error = ""
  try:
    scores = scoring.score(
      [row["completion"] for row in rows],
      [problems[row["pid"]] for row in rows],
      config,
      truncated=[row.get("finish_reason") == "length" for row in rows],
    )
  except scoring.RewardError as caught:
    scores, error = caught.scores, str(caught)
  new = []
  for i, row in enumerate(rows):
    penalty = np.float32(row.get("length_penalty") or 0)
    rewards = {f"reward/{k}": float(x[i]) for k, x in scores.components.items()}
    rewards["reward"] = float(scores.total[i] + penalty)
    own = {"read_answer": scores.answers[i], "valid": bool(scores.valid[i])}
    new.append({**row, **rewards, **own})
  changed = [a["reward"] != b["reward"] for a, b in zip(rows, new, strict=True)]
  return Result(
    rows=new,
    table=_table(rows, scores, config),
    num_changed=int(np.sum(changed & scores.valid)),
    num_valid=int(scores.valid.sum()),
    error=error,
  )


def _table(
  rows: Sequence[Mapping[str, Any]],
  scores: scoring.Scores,
  config: RewardConfig,
) -> str:
  """A line per reward, with statistics over the rows where it did not fail."""
  lines = ["reward                weight     mean      std    saved  rows"]
  columns = [
    (name, f"{config.weights[name]:.3g}", values, ~scores.failed[name])
    for name, values in scores.components.items()
  ]
  columns.append(("total", "", scores.total, scores.valid))

  def cell(function: Callable[[Any], Any], numbers: Sequence[float]) -> str:
    return f"{function(numbers):8.4f}" if len(numbers) else "       -"

  for name, weight, values, is_kept in columns:
    kept = values[is_kept].tolist()
    column = "reward" if name == "total" else f"reward/{name}"
    saved = [rows[i].get(column) for i in np.flatnonzero(is_kept).tolist()]
    saved = [x for x in saved if x is not None]  # None for a new reward.
    cells = f"{cell(np.mean, kept)} {cell(np.std, kept)} {cell(np.mean, saved)}"
    count = f"{len(kept)} of {len(values)}"
    lines.append(f"{name:20}  {weight:>6} {cells}  {count}")
  return "\n".join(lines)


def read_samples(path: str) -> list[dict[str, Any]]:
  """Reads the samples of a run: their folder, or a file of it."""
  named = epath.Path(paths.to_path("--samples", path))
  files = sorted(named.glob("*.parquet")) if named.is_dir() else [named]
  try:
    rows = [
      _check_sample(row, f"row {number} of {validation.printable(str(file))}")
      for file in files
      for number, row in enumerate(readers.parquet(file), start=1)
    ]
    if not rows:
      raise ValueError("it has no samples")
    return rows
  except (OSError, ValueError) as error:
    reason = str(error).removesuffix(".")
    raise ValueError(
      f"--samples ({path!r}) must be WORKDIR/samples of a run, or a file in "
      f"it: {reason}; name another folder."
    ) from error


def _check_sample(row: Any, source: str) -> dict[str, Any]:
  if isinstance(row, records.BadRecord):
    raise ValueError(f"{source} is damaged: {row}.")
  for name in ("pid", "completion"):
    untrusted.get_field(row, name, str, source)
  untrusted.get_field(row, "reward", float, source)
  for name, value in row.items():
    # None for a reward that other rows have.
    if name.startswith(("reward/", "length_penalty")) and value is not None:
      untrusted.check_kind(value, float, f"{name!r} in {source}")
  return row


def read_problems(
  pids: Collection[str], data_dir: str
) -> dict[str, records.Problem]:
  """Reads the problems of these pids from the data dirs of a run."""
  problems = mixtures.problems_by_pid(data_dir, pids)
  if missing := sorted(set(pids) - problems.keys()):
    raise ValueError(
      f"--data_dir ({data_dir!r}) must hold the problems of all samples, but "
      f"{len(missing)} are not in it, for example {missing[0]!r}; name the "
      "data dir of the run (WORKDIR/data if it had none), or those of its "
      "data.dirs with commas between them."
    )
  return problems


def main(argv: Sequence[str]) -> None:
  """Rescores the samples that the flags name; exits 64 on a user error."""
  try:
    with validation.user_errors():
      if len(argv) > 1:
        raise ValueError(f"{argv[1]!r} is not a flag; write --name=value.")
      config = run_config.Config.from_config_dict(flags.FLAGS.config)
      rows = read_samples(flags.FLAGS.samples)
      problems = read_problems({x["pid"] for x in rows}, flags.FLAGS.data_dir)
      out = flags.FLAGS.out and paths.to_path("--out", flags.FLAGS.out)
    result = rescore(rows, problems, config.rewards)
    if out:
      sample_files.write_rows(out, result.rows)
    print(result.table)
    changed = f"{result.num_changed} of {result.num_valid}"
    print(changed, "totals differ from the saved ones.")
    if result.error:
      logging.error("A run would end here: %s", result.error)
      sys.exit(validation.ExitCode.FAILED)
  except validation.SettingError as error:
    command_flags.refuse(error)
  finally:
    scoring.close()


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "Settings; only `rewards` is used.", lock_config=True
  )
  flags.DEFINE_string(
    "samples", None, "WORKDIR/samples of a run, or a file of it."
  )
  flags.DEFINE_string(
    "data_dir",
    None,
    "Folder with the run's problems; DIR,DIR for those of its data.dirs, in "
    "their order.",
  )
  flags.DEFINE_string(
    "out", "", "Parquet file for the samples with their new rewards."
  )
  # A missing config file raises when its settings are first read.
  flags.register_validator("config", lambda x: x is None or bool(x.items()))
  flags.mark_flags_as_required(["config", "samples", "data_dir"])
  app.run(main, flags_parser=command_flags.parse)
