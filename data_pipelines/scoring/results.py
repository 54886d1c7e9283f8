"""Results files: answered problems in MathVista's format.

A file is JSON keyed by pid, as the benchmark's own program and
`--mode=evaluate` write it, a JSON list of records, or JSONL with one record per
line. A fault in any record refuses the whole file, because dropping records
would change what a share of right answers means.

References:
  The format: https://github.com/lupantech/MathVista (results/).
"""

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from data_pipelines import records
from data_pipelines.scoring import figures
from data_pipelines.storage import paths
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
  rows = read_rows(path)
  results, faults = [], []
  for pid, row in rows:
    try:
      with records.all_faults():
        if not records.is_shallow(row):
          raise records.BadRecord("nested", "its fields nest too deeply")
        problem = records.from_result({**row, "pid": pid})
        records.validate_types(problem)
        results.append(Result(problem, row, response_of(row)))
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
  path = epath.Path(path)
  try:
    content = untrusted.read_bytes(path, untrusted.MAX_JSON_BYTES)
    text = content.decode("utf-8-sig")
  except SettingError:
    raise
  except (OSError, ValueError) as error:
    raise error_in(
      path, f"be a text file, but {error}", "name another file"
    ) from error
  if path.suffix == ".jsonl":
    unit = "line"
    # Not splitlines(): JSON strings may contain other line separators.
    lines = [x for x in enumerate(text.split("\n"), 1) if x[1].strip()]
    rows = [(n, _parse(path, x, f"be JSONL in line {n}")) for n, x in lines]
  else:
    unit, parsed = "record", _parse(path, text, "be JSON")
    listed = parsed if isinstance(parsed, list) else [parsed]
    keyed = parsed if isinstance(parsed, dict) else dict(enumerate(listed, 1))
    rows = list(keyed.items())
  if not rows:
    raise error_in(path, "hold a record, but is empty", "name another file")
  found: dict[str, tuple[Any, dict[str, Any]]] = {}
  for place, row in rows:
    key = place if isinstance(place, str) else None
    pid = (_pid_of(row) or key) if isinstance(row, dict) else None
    where = f"{unit} {shorten(place)}"
    if pid is None:
      fault = f"hold one JSON object with a pid in each {unit}, but {where} "
      fault += f"does not: {shorten(row)}"
      remedy = f"correct the {unit}, or give JSON lines the suffix .jsonl"
    elif key not in (None, pid):
      fault = f"key each record by its pid, but {where} has pid {shorten(pid)}"
      remedy = "correct one of them"
    elif pid in found:
      fault = f"hold each pid once, but {shorten(pid)} is in {unit}s "
      fault += f"{found[pid][0]} and {place}"
      remedy = "use one file per run"
    else:
      found[pid] = place, row
      continue
    raise error_in(path, fault, remedy)
  return [(pid, row) for pid, (_, row) in found.items()]


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
  try:
    # UTF-8 has no lone surrogates, so they are written as JSON escapes.
    paths.write_whole(path, text.encode(errors="backslashreplace"))
  except OSError as error:
    raise SettingError(
      f"--{flag} ({os.fspath(path)!r}) must be a file that can be written: "
      f"{error}; name another file."
    ) from error


def write_json(flag: str, path: str | os.PathLike[str], value: Any) -> None:
  """Writes a value as JSON to the file of a flag; see `write`."""
  text = json.dumps(value, indent=2, ensure_ascii=False)
  write(flag, path, f"{text}\n")


def check_different(names: Iterable[str | os.PathLike[str]]) -> None:
  """Refuses results files and outputs of which two are one file."""
  files = [os.fspath(paths.absolute(name)) for name in names]
  if len(set(files)) < len(files):
    raise SettingError(
      f"the results files and the outputs ({', '.join(files)}) must be "
      "different files; name each once."
    )


def _pid_of(row: Mapping[str, Any]) -> str | None:
  """The record's own pid; None if it has no usable one."""
  pid = row.get("pid")
  if isinstance(pid, int) and not isinstance(pid, bool):
    return str(pid)
  return pid if isinstance(pid, str) and pid.strip() else None


def _parse(path: epath.Path, text: str, rule: str) -> Any:
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
