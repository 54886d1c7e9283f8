"""A file of answered problems in MathVista's results layout, held to be whole.

JSON keyed by pid, as the benchmark's own program and `--mode=evaluate` write
it, or JSONL, one record a line. No record is ever dropped: a share of right
answers is only worth what its denominator is. Knows nothing of scoring.
"""

import collections
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_pipelines import records

# The pid that an evaluation gives to a record that it could not read.
_UNREADABLE = "unreadable:"


class ResultsError(ValueError):
  """The file cannot be scored; the message names what to change."""


@dataclasses.dataclass(frozen=True)
class Result:
  """One problem and what was answered.

  Attributes:
    problem: Without its picture; its answer is "" where none is public.
    record: As the file has it, NaN and infinities as null.
    response: What the model wrote; None where it gave none.
  """

  problem: records.Problem
  record: Mapping[str, Any]
  response: str | None

  @property
  def unreadable(self) -> bool:
    """Whether it stands in for a record that an evaluation could not read.

    Nothing is known of such a problem, not even its sort. It could not be
    asked, which is no reason to leave it out: it is wrong.
    """
    return self.problem.pid.startswith(_UNREADABLE)

  @property
  def counts(self) -> bool:
    """Whether it is right or wrong, and not just without a public answer."""
    return self.problem.has_answer or self.unreadable


def read(path: str | os.PathLike[str]) -> list[Result]:
  """Every record of a results file, in its order.

  Args:
    path: JSONL if it ends in .jsonl, else JSON.

  Raises:
    ResultsError: The file, or any record of it, is not as it should be.
  """
  path = pathlib.Path(path)
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, ValueError) as error:
    raise _error(path, f"be a file of text, but {error}", "name one") from error
  lines = path.suffix == ".jsonl"
  rows = list(_lines(path, text) if lines else _keyed(path, text))
  if not rows:
    raise _error(path, "hold some record, but is empty", "name another")
  results, faults = [], []
  for pid, row in rows:
    try:
      results.append(_result(pid, row))
    except records.BadRecord as error:
      faults.append((pid, error))
  if faults:
    reasons = collections.Counter(error.reason for _, error in faults)
    counted = ", ".join(f"{n} {why}" for why, n in sorted(reasons.items()))
    pid, first = faults[0]
    raise _error(
      path,
      f"hold records in MathVista's schema, but {len(faults)} of {len(rows)} "
      f"are not ({counted}; the first: pid {pid!r}, {first.detail})",
      "mend them, or take them out and say so",
    )
  return results


def _error(path: pathlib.Path, fault: str, remedy: str) -> ResultsError:
  return ResultsError(f"results file ({str(path)!r}) must {fault}; {remedy}.")


def _keyed(path: pathlib.Path, text: str) -> Iterator[tuple[str, dict]]:
  """The records of a JSON object, each with the key that is its pid."""
  rows = _parsed(path, text, "be JSON")
  if not isinstance(rows, dict) or not all(
    isinstance(row, dict) for row in rows.values()
  ):
    raise _error(
      path,
      "hold one JSON object, from each pid to its record",
      "give one record a line the suffix .jsonl",
    )
  for pid, row in rows.items():
    if _pid(row) not in (None, pid):
      raise _error(
        path,
        f"key each record by its pid, but {pid!r} has pid {row['pid']!r}",
        "mend either",
      )
    yield pid, row


def _lines(path: pathlib.Path, text: str) -> Iterator[tuple[str, dict]]:
  """The record of each line that is not blank, with its pid."""
  first: dict[str, int] = {}
  # Not splitlines(), for JSON may hold the other ends of lines as they stand.
  for number, line in enumerate(text.split("\n"), start=1):
    if not line.strip():
      continue
    row = _parsed(path, line, f"be JSONL in line {number}")
    pid = _pid(row) if isinstance(row, dict) else None
    if pid is None:
      raise _error(
        path,
        f"hold one JSON object with a pid in each line, but line {number} "
        f"does not: {line.strip()[:80]!r}",
        "mend the line",
      )
    if pid in first:
      raise _error(
        path,
        f"hold each pid once, but {pid!r} is in lines {first[pid]} and "
        f"{number}",
        "score the files of several runs one by one",
      )
    first[pid] = number
    yield pid, row


def _pid(row: Mapping[str, Any]) -> str | None:
  """The record's own pid; None if it has none that names it."""
  pid = row.get("pid")
  if isinstance(pid, int) and not isinstance(pid, bool):
    return str(pid)
  return pid if isinstance(pid, str) and pid.strip() else None


def _parsed(path: pathlib.Path, text: str, rule: str) -> Any:
  try:
    return json.loads(
      text, object_pairs_hook=_once, parse_constant=lambda name: None
    )
  except (ValueError, RecursionError) as error:
    raise _error(path, f"{rule}, but {error}", "mend the file") from error


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """The pairs as a dict. JSON lets the last of two equal keys win silently."""
  table: dict[str, Any] = {}
  for key, value in pairs:
    if key in table:
      raise ValueError(f"key {key!r} stands twice in one object")
    table[key] = value
  return table


def _result(pid: str, row: Mapping[str, Any]) -> Result:
  """The record with its problem, both held to the schema.

  Raises:
    BadRecord: Neither right nor wrong could be said of an answer to it.
  """
  problem = records.from_result({**row, "pid": pid})
  records.validate_types(problem)
  skills = problem.metadata.get("skills", [])
  if not isinstance(skills, str | list):
    raise records.BadRecord(
      "bad_metadata", f"skills holds a {type(skills).__name__}"
    )
  response = row.get("response")
  if response is not None and not isinstance(response, str):
    raise records.BadRecord(
      "not_text", f"response holds a {type(response).__name__}"
    )
  return Result(problem, row, response)
