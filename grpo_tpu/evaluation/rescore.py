"""Scores the saved completions of a run again, with other rewards if wanted.

    python -m grpo_tpu.evaluation.rescore --config=configs/base.py \\
      --data_dir=DIR --samples=WORKDIR/samples/train.jsonl \\
      --config.rewards.format=0.5

Prints the mean and standard deviation of each reward, and how many totals
differ from the saved ones; with the rewards of the run none differs. Uses no
device. The exit codes are those of `main`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from data_pipelines import flags as command_flags
from data_pipelines import records, validation
from data_pipelines.sources import mathvista
from grpo_tpu.config import schema as run_config
from grpo_tpu.rewards import scoring
from grpo_tpu.rewards.settings import RewardConfig


@dataclasses.dataclass(frozen=True)
class Result:
  """The new rewards of saved completions."""

  # The saved rows with new `reward` and `rewards`, and the names of the rewards
  # that `failed`.
  rows: list[dict[str, Any]]
  table: str  # The mean and standard deviation of each reward.
  num_changed: int  # Totals that differ from the saved ones in any digit.


def rescore(
  rows: Sequence[Mapping[str, Any]],
  problems: Mapping[str, records.Problem],
  config: RewardConfig,
) -> Result:
  """Computes the rewards of lines of `samples/*.jsonl`.

  Raises:
    RewardError: A reward failed too often.
  """
  scores = scoring.score(
    [row["completion"] for row in rows],
    [problems[row["pid"]] for row in rows],
    config,
  )
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
  return Result(new, _table(rows, scores, config), sum(changed))


def _table(
  rows: Sequence[Mapping[str, Any]],
  scores: scoring.Scores,
  config: RewardConfig,
) -> str:
  """One line per reward, with statistics over the rows without a failure."""
  lines = ["reward                weight     mean      std    saved  failed"]
  columns = [
    (name, f"{config.weights[name]:.3g}", values, scores.errors[name])
    for name, values in scores.components.items()
  ]
  columns.append(("total", "", scores.total, int((~scores.valid).sum())))
  for name, weight, values, failures in columns:
    kept = values[scores.valid].astype(np.float64)
    mean, std = (kept.mean(), kept.std()) if kept.size else (0.0, 0.0)
    before = [
      row["reward"] if name == "total" else row["rewards"].get(name)
      for row, is_kept in zip(rows, scores.valid, strict=True)
      if is_kept
    ]
    # A sample holds null for a value that is not finite, and nothing for a new
    # reward.
    finite = [x for x in before if x is not None]
    saved = f"{np.mean(finite):8.4f}" if finite else "       -"
    lines.append(
      f"{name:20}  {weight:>6} {mean:8.4f} {std:8.4f} {saved} {failures:7}"
    )
  return "\n".join(lines)


def read_samples(path: str) -> list[dict[str, Any]]:
  """Reads a file of samples, except for an unfinished last line.

  Raises:
    ValueError: There is no such file, or it holds something else.
  """
  try:
    lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
  except OSError as error:
    raise ValueError(
      f"--samples ({path!r}) must be a file such as "
      f"WORKDIR/samples/train.jsonl, but {error}; name a file."
    ) from error
  rows = []
  for number, line in enumerate(lines, start=1):
    try:
      row = json.loads(line)
      kinds = {"pid": str, "completion": str, "rewards": dict}
      if not all(isinstance(row[k], kind) for k, kind in kinds.items()):
        raise ValueError("pid, completion or rewards is of another type")
      rows.append(row | {"reward": row["reward"]})
    except (ValueError, KeyError, TypeError) as error:
      if number == len(lines) and not line.endswith(b"\n"):
        logging.warning("%s: skipped an unfinished last line.", path)
        break
      raise ValueError(
        f"--samples ({path!r}) must hold one sample per line, but line "
        f"{number} does not: {error!r}; remove the line."
      ) from error
  return rows


def read_problems(
  pids: Collection[str], data_dir: str
) -> dict[str, records.Problem]:
  """Reads the problems of these pids from a data dir.

  Raises:
    ValueError: The folder is no data dir, or lacks some problems.
  """
  problems = mathvista.problems_by_pid(data_dir, pids)
  if missing := sorted(set(pids) - problems.keys()):
    raise ValueError(
      f"--data_dir ({data_dir!r}) must hold the problems of all samples, but "
      f"{len(missing)} are not in it, for example {missing[0]!r}; name the "
      "data dir of the run (WORKDIR/data if it had none)."
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
    result = rescore(rows, problems, config.rewards)
    if flags.FLAGS.out:
      text = "".join(json.dumps(row) + "\n" for row in result.rows)
      pathlib.Path(flags.FLAGS.out).write_text(text)
    print(result.table)
    changed = f"{result.num_changed} of {len(rows)}"
    print(changed, "totals differ from the saved ones.")
  except validation.SettingError as error:
    command_flags.refuse(error)
  finally:
    scoring.close()


def _parse_flags(argv: Sequence[str]) -> list[str]:
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
  flags.DEFINE_string("data_dir", None, "Folder with the run's problems.")
  flags.DEFINE_string("out", "", "File for the samples with their new rewards.")
  flags.mark_flags_as_required(["config", "samples", "data_dir"])
  app.run(main, flags_parser=_parse_flags)
