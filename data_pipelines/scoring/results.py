"""Results files: answered problems in MathVista's format.

A file is JSON keyed by pid, as the benchmark's own program and
`--mode=evaluate` write it, a JSON list of records, or JSONL with one record per
line. A fault in any record refuses the whole file, because dropping records
would change what a share of right answers means.

References:
  The format: https://github.com/lupantech/MathVista (results/).
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_pipelines import records
from data_pipelines.scoring import figures
from data_pipelines.text import untrusted
from data_pipelines.text.untrusted import shorten
from data_pipelines.validation import SettingError

# The metadata of a record that an evaluation could not read: MathVista's
# programs need all of these.
_SLICES = ("language", "source", "category", "task", "context", "grade")
NO_METADATA = dict.fromkeys(_SLICES, "") | {"skills": []}


@dataclasses.dataclass(frozen=True)
class Result:
  """One problem and the response to it."""

  problem: records.Problem  # Without its image; the answer is "" if not public.
  record: Mapping[str, Any]  # As in the file, with None for NaN and infinities.
  response: str | None

  @property
  def counts(self) -> bool:
    """True if the record is right or wrong, False without a public answer.

    A record that an evaluation could not read counts as wrong.
    """
    return self.problem.is_checkable or figures.is_unreadable(self.problem.pid)


def read(path: str | os.PathLike[str]) -> list[Result]:
  """Reads every record of a results file, in its order, and validates it.

  Raises:
    SettingError: The file or a record breaks a rule.
  """
  rows = list(read_rows(path))
  results, faults = [], []
  for pid, row in rows:
    try:
      with records.all_faults():
        results.append(_to_result(pid, row))
    except records.BadRecord as error:
      faults.append((pid, error))
  if faults:
    reasons = collections.Counter(error.reason for _, error in faults)
    counted = ", ".join(f"{n} {why}" for why, n in sorted(reasons.items()))
    pid, first = faults[0]
    raise error_in(
      path,
      f"hold records in MathVista's schema, but {len(faults)} of {len(rows)} "
      f"do not match ({counted}; the first: pid {shorten(pid)}, "
      f"{first.detail})",
      "correct or remove them",
    )
  return results


def read_rows(
  path: str | os.PathLike[str],
) -> list[tuple[str, dict[str, Any]]]:
  """Reads every record of a results file with its pid, without validation.

  A file whose name ends in .jsonl is JSONL, any other JSON.

  Raises:
    SettingError: The file has another layout, or a pid occurs twice.
  """
  path = pathlib.Path(path)
  try:
    content = untrusted.read_bytes(path, untrusted.MAX_JSON_BYTES)
    text = content.decode("utf-8-sig")
  except (OSError, ValueError) as error:
    raise error_in(
      path, f"be a text file, but {error}", "name another file"
    ) from error
  if path.suffix == ".jsonl":
    pairs = _check_pids(path, "line", _parse_lines(path, text))
  elif isinstance(parsed := _parse(path, text, "be JSON"), list):
    pairs = _check_pids(path, "record", enumerate(parsed, start=1))
  else:
    pairs = _rows_by_pid(path, parsed)
  rows = list(pairs)
  if not rows:
    raise error_in(path, "hold a record, but is empty", "name another file")
  return rows


def strict_fields(
  problem: records.Problem, answer: str | None, is_right: bool | None
) -> dict[str, Any]:
  """Our reading of a response and our verdict, as a record holds them.

  `extraction`, `prediction` and `true_false` belong to MathVista's programs. A
  list is written with the blanks that MathVista's answers have. The verdict is
  None if the answer is not public.
  """
  if answer is not None and problem.answer_type == "list":
    answer = answer.replace(",", ", ")
  return {"strict_answer": answer, "strict_true_false": is_right}


def response_of(record: Mapping[str, Any]) -> str | None:
  """The record's response; None if there is none.

  Raises:
    BadRecord: The response is no text.
  """
  response = record.get("response")
  if isinstance(response, str | None):
    return response
  kind = type(response).__name__
  raise records.BadRecord("not_text", f"response holds a {kind}")


def error_in(
  path: str | os.PathLike[str], fault: str, remedy: str
) -> SettingError:
  """The error for a fault in a results file."""
  file = f"results file ({os.fspath(path)!r})"
  return SettingError(f"{file} must {fault}; {remedy}.")


def write(flag: str, path: str | os.PathLike[str], text: str) -> None:
  """Writes a text to the file of a flag, whole or not at all.

  Raises:
    SettingError: The file cannot be written.
  """
  target = pathlib.Path(path)
  part = target.parent / f".{target.name}.part"
  try:
    # UTF-8 has no lone surrogates, so they are written as JSON escapes.
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(target)
  except OSError as error:
    with contextlib.suppress(OSError):
      part.unlink(missing_ok=True)
    raise SettingError(
      f"--{flag} ({os.fspath(path)!r}) must be a file that can be written: "
      f"{error}; name another file."
    ) from error


def _rows_by_pid(path: pathlib.Path, parsed: Any) -> Iterator[tuple[str, dict]]:
  """The records of a JSON object whose keys are their pids."""
  if not isinstance(parsed, dict) or not all(
    isinstance(row, dict) for row in parsed.values()
  ):
    raise error_in(
      path,
      "hold one JSON object that maps each pid to its record",
      "name a file with one record per line with the suffix .jsonl",
    )
  for pid, row in parsed.items():
    if _pid_of(row) not in (None, pid):
      raise error_in(
        path,
        f"key each record by its pid, but {shorten(pid)} has pid "
        f"{shorten(row['pid'])}",
        "correct one of them",
      )
    yield pid, row


def _parse_lines(path: pathlib.Path, text: str) -> Iterator[tuple[int, Any]]:
  """The parsed lines that are not blank, with their numbers."""
  # Not splitlines(): JSON strings may contain other line separators.
  for number, line in enumerate(text.split("\n"), start=1):
    if line.strip():
      yield number, _parse(path, line, f"be JSONL in line {number}")


def _check_pids(
  path: pathlib.Path, unit: str, rows: Iterable[tuple[int, Any]]
) -> Iterator[tuple[str, dict]]:
  """The records of lines or of a list, each with its own pid."""
  first: dict[str, int] = {}
  for number, row in rows:
    pid = _pid_of(row) if isinstance(row, dict) else None
    if pid is None:
      raise error_in(
        path,
        f"hold one JSON object with a pid in each {unit}, but {unit} {number} "
        f"does not: {shorten(row)}",
        f"correct the {unit}",
      )
    if pid in first:
      raise error_in(
        path,
        f"hold each pid once, but {shorten(pid)} is in {unit}s {first[pid]} "
        f"and {number}",
        "use one file per run",
      )
    first[pid] = number
    yield pid, row


def _pid_of(row: Mapping[str, Any]) -> str | None:
  """The record's own pid; None if it has no usable one."""
  pid = row.get("pid")
  if isinstance(pid, int) and not isinstance(pid, bool):
    return str(pid)
  return pid if isinstance(pid, str) and pid.strip() else None


def _parse(path: pathlib.Path, text: str, rule: str) -> Any:
  try:
    return json.loads(
      text, object_pairs_hook=_unique_keys, parse_constant=lambda name: None
    )
  except (ValueError, RecursionError) as error:
    raise error_in(path, f"{rule}, but {error}", "correct the file") from error


def _unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
  """Builds a dict; plain JSON silently keeps the last of two equal keys."""
  table: dict[str, Any] = {}
  for key, value in pairs:
    if key in table:
      raise ValueError(f"key {shorten(key)} occurs twice in one object")
    table[key] = value
  return table


def _to_result(pid: str, row: Mapping[str, Any]) -> Result:
  """The record with its problem; raises BadRecord if one breaks the schema."""
  if not records.is_shallow(row):
    raise records.BadRecord("nested", "its fields nest too deeply")
  problem = records.from_result({**row, "pid": pid})
  records.validate_types(problem)
  return Result(problem, row, response_of(row))
