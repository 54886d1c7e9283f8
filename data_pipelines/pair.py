"""Labelled replies out of results files, for `data.preference_file`.

    python -m data_pipelines.pair output_a.json output_b.json --out=FILE

Several files give several responses to one problem; the verifier labels each,
1.0 for right and 0.0 for wrong. Groups without both are left out. A results
file is MathVista's own, `{"1": {"pid": "1", "response": "...", ...}, ...}`, a
list of such records, or one to a line. What the problems are is read from the
records themselves, or from a data dir.

References:
  The format: https://github.com/lupantech/MathVista (results/).
"""

import collections
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from data_pipelines import flags as command_line
from data_pipelines import records
from data_pipelines.preferences import replies as preferences
from data_pipelines.sources import mathvista
from data_pipelines.verifier import verify

_MANIFEST = "manifest.json"


class RequestError(ValueError):
  """What was asked for cannot be made; the message names what to change."""


def write(
  results: Sequence[str | os.PathLike[str]],
  out: str | os.PathLike[str],
  *,
  data_dir: str | os.PathLike[str] = "",
) -> dict[str, int]:
  """Writes the groups of some results files, one to a line.

  They stand in the order in which the files first name their problems. The
  first two replies are a right and a wrong one, of all those the nearest in
  length, the next two the nearest of the rest, and so on; what one side has
  more of follows. So whoever takes the first few compares like with like.

  Args:
    results: Results files, each with at most one response to a problem.
    out: The file to write; replaced whole or not at all.
    data_dir: What `data_pipelines.prepare` wrote, whose problems are asked; ""
      takes each problem from its first record.

  Returns:
    How many `groups` and `replies` were written, and how many problems were
    left out for want of a right or of a wrong response, an answer, or a place
    in the data dir. `empty` and `repeated` count responses left out.

  Raises:
    RequestError: A file is not as it should be, or no group can be made.
  """
  responses: dict[str, list[str]] = {}
  problems: dict[str, records.Problem] = {}
  counts: collections.Counter[str] = collections.Counter(
    dict.fromkeys(
      (
        *("groups", "replies", "without_right", "without_wrong"),
        *("without_answer", "not_in_data_dir", "empty", "repeated"),
      ),
      0,
    )
  )
  for path in results:
    for record in _records(path):
      problem = _problem(record, path)
      problems.setdefault(problem.pid, problem)
      texts = responses.setdefault(problem.pid, [])
      text = _response(record, path)
      if not text.strip():
        counts["empty"] += 1
      elif text in texts:
        counts["repeated"] += 1
      else:
        texts.append(text)
  if data_dir:
    problems = _problems(data_dir)
  lines = []
  for pid, texts in responses.items():
    problem = problems.get(pid)
    missing, replies = _group(problem, texts)
    if missing:
      counts[missing] += 1
      continue
    counts["groups"] += 1
    counts["replies"] += len(replies)
    completions = [reply._asdict() for reply in replies]
    row = {"pid": pid, "completions": completions}
    lines.append(json.dumps(row, ensure_ascii=False) + "\n")
  if not lines:
    raise RequestError(
      f"the results ({', '.join(map(str, results))}) must have a right and a "
      f"wrong response to some problem, but have none: {dict(counts)}; add the "
      "results of another model."
    )
  unfinished = pathlib.Path(f"{os.fspath(out)}.unfinished")
  unfinished.write_text("".join(lines), encoding="utf-8")
  os.replace(unfinished, out)
  return dict(counts)


def _group(
  problem: records.Problem | None, texts: Sequence[str]
) -> tuple[str, list[preferences.Reply]]:
  """The labelled replies, or why there is no group."""
  if problem is None:
    return "not_in_data_dir", []
  if not problem.has_answer:
    return "without_answer", []
  right, wrong = [], []
  for text in texts:
    correct = verify.verify(text, problem).correct
    (right if correct else wrong).append(text)
  if not right or not wrong:
    return "without_wrong" if right else "without_right", []
  replies = []
  while right and wrong:
    better, worse = min(
      ((a, b) for a in right for b in wrong),
      key=lambda pair: abs(len(pair[0]) - len(pair[1])),
    )
    right.remove(better)
    wrong.remove(worse)
    replies += [preferences.Reply(better, 1.0), preferences.Reply(worse, 0.0)]
  replies += [preferences.Reply(text, 1.0) for text in right]
  return "", replies + [preferences.Reply(text, 0.0) for text in wrong]


def _records(path: str | os.PathLike[str]) -> Iterator[Mapping[str, Any]]:
  """The records of a results file, in its order, each with its pid."""
  try:
    text = pathlib.Path(path).read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise RequestError(
      f"results ({os.fspath(path)!r}) must be a file of results: {error}; "
      "name one."
    ) from error
  seen: set[str] = set()
  for record in _parsed(text, path):
    pid = record.get("pid")
    if not isinstance(pid, str | int) or str(pid) in seen:
      raise RequestError(
        f"results ({os.fspath(path)!r}) must have one record of each pid, but "
        f"has pid {pid!r} missing or twice; mend the file."
      )
    seen.add(str(pid))
    yield record


def _parsed(
  text: str, path: str | os.PathLike[str]
) -> Sequence[Mapping[str, Any]]:
  try:
    try:
      parsed = json.loads(text)
    except ValueError:
      parsed = [json.loads(line) for line in text.splitlines() if line.strip()]
    # One line alone is a record, not a table of records.
    if isinstance(parsed, dict) and "response" in parsed:
      parsed = [parsed]
    if isinstance(parsed, dict):
      parsed = [{"pid": pid, **record} for pid, record in parsed.items()]
    if not all(isinstance(record, dict) for record in parsed):
      raise ValueError("not every record is an object")
    return parsed
  except (ValueError, TypeError) as error:
    raise RequestError(
      f"results ({os.fspath(path)!r}) must be JSON records by pid, a list of "
      f"them, or one to a line: {error}; mend the file."
    ) from error


def _response(record: Mapping[str, Any], path: str | os.PathLike[str]) -> str:
  """What the model wrote; null is nothing."""
  response = record.get("response")
  if response is not None and not isinstance(response, str):
    raise RequestError(
      f"results ({os.fspath(path)!r}) must have text for every response, not "
      f"{response!r} for pid {record['pid']}; mend the record."
    )
  return response or ""


def _problem(
  record: Mapping[str, Any], path: str | os.PathLike[str]
) -> records.Problem:
  """The problem that a record answers, with nothing for its picture."""
  row = {
    **record,
    "pid": str(record["pid"]),
    # Of no use here, and results files leave it out.
    "decoded_image": {"bytes": b"-"},
    "query": record.get("query") or "-",
  }
  try:
    return records.from_row(row)
  except records.BadRecord as error:
    raise RequestError(
      f"results ({os.fspath(path)!r}) must describe a problem in every record, "
      f"but that of pid {record['pid']} does not: {error}; mend the record."
    ) from error


def _problems(data_dir: str | os.PathLike[str]) -> dict[str, records.Problem]:
  """The problems of every split of a data dir, by pid."""
  try:
    manifest = json.loads((pathlib.Path(data_dir) / _MANIFEST).read_text())
    splits = [split for split, count in manifest["counts"].items() if count]
    sources = [mathvista.source(data_dir, split) for split in splits]
  except (OSError, ValueError, KeyError) as error:
    raise RequestError(
      f"data_dir ({os.fspath(data_dir)!r}) must be a folder that "
      f"data_pipelines.prepare has made: {error}; make it first."
    ) from error
  return {
    problem.pid: problem
    for source in sources
    for problem in (source[i] for i in range(len(source)))
  }


FLAGS = flags.FLAGS


def _define_flags() -> None:
  """The flags of the command; for its importers there are none."""
  flags.DEFINE_string("out", "", "The file to write, JSON lines.")
  flags.DEFINE_string(
    "data_dir",
    "",
    "Whose problems are asked; without it the results say what they are.",
  )


def main(argv: Sequence[str]) -> None:
  """Pairs the files that are named; exits 64 where that cannot be done."""
  try:
    if len(argv) < 2 or not FLAGS.out:
      raise RequestError(
        f"results ({argv[1:]}) and out ({FLAGS.out!r}) must name files, as in "
        "output_a.json output_b.json --out=FILE."
      )
    counts = write(argv[1:], FLAGS.out, data_dir=FLAGS.data_dir)
  except RequestError as error:
    command_line.refuse(error)
  said = ", ".join(f"{name} {count}" for name, count in counts.items())
  logging.info("Wrote %s: %s.", FLAGS.out, said)


if __name__ == "__main__":
  _define_flags()
  logging.set_verbosity(logging.INFO)
  app.run(main, flags_parser=command_line.parse)
