"""Scores the saved completions of a run again, with other rewards if wanted.

    python -m grpo_tpu.evaluation.rescore --config=configs/base.py \\
      --data_dir=DIR --samples=WORKDIR/samples/train.jsonl \\
      --config.rewards.format=0.5

Prints the mean and standard deviation of each reward, and how many totals
differ from the saved ones; with the rewards of the run none differs. Uses no
device. The exit codes are those of `main`: 1 if the failures of a reward would
end a run.
"""

import dataclasses
import json
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from data_pipelines import flags as command_flags
from data_pipelines import records, validation
from data_pipelines.sources import mixtures
from data_pipelines.text import untrusted
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import logs
from grpo_tpu.rewards import scoring
from grpo_tpu.rewards.settings import RewardConfig

_MAX_SAMPLE_BYTES = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class Result:
  """The new rewards of saved completions."""

  # The saved rows with new `reward` and `rewards`, and the names of the rewards
  # that `failed`.
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
  """Computes the rewards of lines of `samples/*.jsonl`."""
  error = ""
  try:
    scores = scoring.score(
      [row["completion"] for row in rows],
      [problems[row["pid"]] for row in rows],
      config,
    )
  except scoring.RewardError as caught:
    scores, error = caught.scores, str(caught)
  new = [
    dict(row)
    | {
      "reward": float(scores.total[i]),
      "rewards": {k: float(v[i]) for k, v in scores.components.items()},
      "failed": [name for name, failed in scores.failed.items() if failed[i]],
    }
    for i, row in enumerate(rows)
  ]
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
  """One line per reward, with statistics over the rows where it did not fail.

  The total is that of the rows where no reward failed.
  """
  lines = ["reward                weight     mean      std    saved  rows"]
  columns = [
    (name, f"{config.weights[name]:.3g}", values, ~scores.failed[name])
    for name, values in scores.components.items()
  ]
  columns.append(("total", "", scores.total, scores.valid))
  for name, weight, values, is_kept in columns:
    kept = values[is_kept].astype(np.float64)
    before = [
      row["reward"] if name == "total" else row["rewards"].get(name)
      for row, keep in zip(rows, is_kept, strict=True)
      if keep
    ]
    # A sample holds null for a value that is not finite, and nothing for a new
    # reward.
    finite = [x for x in before if x is not None]
    cells = [
      f"{function(numbers):8.4f}" if len(numbers) else "       -"
      for function, numbers in (
        (np.mean, kept),
        (np.std, kept),
        (np.mean, finite),
      )
    ]
    count = f"{len(kept)} of {len(values)}"
    lines.append(f"{name:20}  {weight:>6} {' '.join(cells)}  {count}")
  return "\n".join(lines)


def read_samples(path: str) -> list[dict[str, Any]]:
  """Reads a file of samples, except for an unfinished last line.

  Raises:
    ValueError: There is no such file, or it holds something else.
  """
  try:
    content = untrusted.read_bytes(
      validation.to_path("--samples", path), _MAX_SAMPLE_BYTES
    )
  except OSError as error:
    raise ValueError(
      f"--samples ({path!r}) must be a file such as "
      f"WORKDIR/samples/train.jsonl, but {error}; name a file."
    ) from error
  lines = content.splitlines(keepends=True)
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      rows.append(_read_sample(line, f"line {number}"))
    except ValueError as error:
      if number == len(lines) and not line.endswith(b"\n"):
        logging.warning("%s: skipped an unfinished last line.", path)
        break
      raise ValueError(
        f"--samples ({path!r}) must hold one sample per line, but {error} "
        "Remove the line."
      ) from error
  return rows


def _read_sample(line: bytes, source: str) -> dict[str, Any]:
  row = untrusted.parse_json(line, source)
  for name, kind in (("pid", str), ("completion", str), ("rewards", dict)):
    untrusted.get_field(row, name, kind, source)
  if "reward" not in row:
    raise ValueError(f"{source} must have a field 'reward'.")
  for name, value in [("reward", row["reward"]), *row["rewards"].items()]:
    if value is not None:  # As a value that is not finite is saved.
      untrusted.check_kind(value, float, f"{name!r} in {source}")
  return row


def read_problems(
  pids: Collection[str], data_dir: str
) -> dict[str, records.Problem]:
  """Reads the problems of these pids from the data dirs of a run.

  Raises:
    ValueError: A folder is no data dir, or they lack some problems.
  """
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
      out = flags.FLAGS.out and validation.to_path("--out", flags.FLAGS.out)
    result = rescore(rows, problems, config.rewards)
    if out:
      text = "".join(json.dumps(row) + "\n" for row in result.rows)
      out.write_text(text)
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


def _parse_flags(argv: Sequence[str]) -> list[str]:
  logs.set_up()
  try:
    arguments = flags.FLAGS(list(argv))
    # A missing config file raises only when its settings are read.
    flags.FLAGS.config.items()
    return arguments
  except Exception as error:  # A config file may raise anything.
    flags.FLAGS.mark_as_parsed()
    command_flags.refuse(f"{' '.join(str(error).split())}; see --help.")


if __name__ == "__main__":
  config_flags.DEFINE_config_file(
    "config", None, "Settings; only `rewards` is used.", lock_config=True
  )
  flags.DEFINE_string("samples", None, "WORKDIR/samples/train.jsonl of a run.")
  flags.DEFINE_string(
    "data_dir",
    None,
    "Folder with the run's problems; DIR,DIR for those of its data.dirs, in "
    "their order.",
  )
  flags.DEFINE_string("out", "", "File for the samples with their new rewards.")
  flags.mark_flags_as_required(["config", "samples", "data_dir"])
  app.run(main, flags_parser=_parse_flags)
