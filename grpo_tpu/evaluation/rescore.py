"""Pays the completions that a run saved once more, with other rewards perhaps.

    python -m grpo_tpu.evaluation.rescore --config=configs/base.py \\
      --data_dir=DIR --samples=WORKDIR/samples/train.jsonl \\
      --config.rewards.format=0.5

Prints each reward's mean and spread, and how many totals differ from those
saved: none, if the rewards are those of the run. No device is touched. Exit
codes are those of `main`.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from data_pipelines import records, validation
from data_pipelines.sources import mathvista
from grpo_tpu.config import schema as run_config
from grpo_tpu.rewards import scoring


@dataclasses.dataclass(frozen=True)
class Rescored:
  """What saved completions are paid now.

  Attributes:
    rows: The lines of the file with `reward`, `rewards` and, by name, which of
      them `failed`; in their order.
    table: Mean and spread of each reward, in words.
    num_changed: Totals that are not, to the last digit, what was saved.
  """

  rows: list[dict[str, Any]]
  table: str
  num_changed: int


def rescored(
  rows: Sequence[Mapping[str, Any]],
  problems: Mapping[str, records.Problem],
  config: scoring.RewardConfig,
) -> Rescored:
  """Pays every row anew.

  Args:
    rows: Lines of `samples/*.jsonl`.
    problems: By pid; those of all rows.
    config: The rewards.

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
  return Rescored(new, _table(rows, scores, config), sum(changed))


def _table(
  rows: Sequence[Mapping[str, Any]],
  scores: scoring.Scores,
  config: scoring.RewardConfig,
) -> str:
  """A line for each reward; statistics are over the rows that now count."""
  lines = ["reward                weight     mean      std    saved  failed"]
  columns = [
    (name, f"{config.weights[name]:.3g}", values, scores.errors[name])
    for name, values in scores.components.items()
  ]
  columns.append(("total", "", scores.total, int((~scores.valid).sum())))
  for name, weight, values, failures in columns:
    kept = values[scores.valid].astype(np.float64)
    mean, spread = (kept.mean(), kept.std()) if kept.size else (0.0, 0.0)
    before = [
      row["reward"] if name == "total" else row["rewards"].get(name)
      for row, is_kept in zip(rows, scores.valid, strict=True)
      if is_kept
    ]
    # null stands for a number that is not finite; a reward may be a new one.
    found = [x for x in before if x is not None]
    saved = f"{np.mean(found):8.4f}" if found else "       -"
    lines.append(
      f"{name:20}  {weight:>6} {mean:8.4f} {spread:8.4f} {saved} {failures:7}"
    )
  return "\n".join(lines)


def read_samples(path: str) -> list[dict[str, Any]]:
  """The lines of a file of samples; a last one cut short by a kill is not.

  Raises:
    ValueError: There is no such file, or it holds something else.
  """
  try:
    lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
  except OSError as error:
    raise ValueError(
      f"--samples ({path!r}) must be a file such as "
      f"WORKDIR/samples/train.jsonl, but {error}; name one."
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
        logging.warning("%s: left out a broken last line.", path)
        break
      raise ValueError(
        f"--samples ({path!r}) must hold one sample a line, but line {number} "
        f"does not: {error!r}; remove it."
      ) from error
  return rows


def problems_of(
  pids: Collection[str], data_dir: str
) -> dict[str, records.Problem]:
  """The problems of these pids, from whichever split holds them.

  Raises:
    ValueError: It is no data dir, or not the one that has them.
  """
  path = pathlib.Path(data_dir) / "manifest.json"
  try:
    splits = list(json.loads(path.read_text())["counts"])
  except (OSError, ValueError, KeyError) as error:
    raise ValueError(
      f"--data_dir ({data_dir!r}) must be what data_pipelines.prepare has "
      f"made, with its manifest.json, but {error!r}; name the run's "
      "(WORKDIR/data if it had none)."
    ) from error
  wanted, found = set(pids), {}
  for split in splits:
    source = mathvista.source(data_dir, split)
    for index in range(len(source)):
      try:
        problem = source[index]
      except (ValueError, OSError):
        continue  # A damaged record was never asked, so no sample is of it.
      if problem.pid in wanted:
        found[problem.pid] = problem
  if missing := sorted(wanted - found.keys()):
    raise ValueError(
      f"--data_dir ({data_dir!r}) must hold the problems of all samples, but "
      f"{len(missing)} are not there, {missing[0]!r} for one; name the data "
      "dir of the run."
    )
  return found


def main(argv: Sequence[str]) -> None:
  """Does what the flags ask for; exits 64 where they cannot be followed."""
  try:
    with validation.user_errors():
      if len(argv) > 1:
        raise ValueError(f"{argv[1]!r} is not a flag; write --name=value.")
      config = run_config.Config.from_config_dict(flags.FLAGS.config)
      rows = read_samples(flags.FLAGS.samples)
      problems = problems_of({x["pid"] for x in rows}, flags.FLAGS.data_dir)
    result = rescored(rows, problems, config.rewards)
    if flags.FLAGS.out:
      text = "".join(json.dumps(row) + "\n" for row in result.rows)
      pathlib.Path(flags.FLAGS.out).write_text(text)
    sys.stdout.write(
      f"{result.table}\n{result.num_changed} of {len(rows)} totals differ from "
      "those saved.\n"
    )
  except validation.SettingError as error:
    logging.error("%s", error)
    sys.exit(validation.ExitCode.BAD_INPUT)
  finally:
    scoring.close()


def _define_flags() -> None:
  config_flags.DEFINE_config_file(
    "config", None, "Settings, of which `rewards` are used.", lock_config=True
  )
  for name, meaning in (
    ("samples", "JSON lines that a run wrote, WORKDIR/samples/train.jsonl."),
    ("data_dir", "Where the run's problems are."),
  ):
    flags.DEFINE_string(name, None, meaning)
  flags.DEFINE_string("out", "", "A file for the samples as they are paid now.")
  flags.mark_flags_as_required(["config", "samples", "data_dir"])


def _parse_flags(argv: Sequence[str]) -> list[str]:
  try:
    arguments = flags.FLAGS(list(argv))
    # A config file that is not there raises when it is first looked into.
    flags.FLAGS.config.items()
    return arguments
  except Exception as error:  # Of whatever kind: this only reads settings.
    flags.FLAGS.mark_as_parsed()
    logging.error("%s; see --help.", " ".join(str(error).split()))
    sys.exit(validation.ExitCode.BAD_INPUT)


if __name__ == "__main__":
  _define_flags()
  app.run(main, flags_parser=_parse_flags)
