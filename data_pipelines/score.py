"""What a file of answers is worth, by rules alone and offline.

    python -m data_pipelines.score output_testmini.json [--out=FILE] \
      [--scores=FILE]

Reads MathVista's results layout (see `results`) and prints a table: overall
and for each sort of problem the share that our verifier finds right in the
`response` (strict), what MathVista's own scoring makes of it (official; from
the stored `extraction` where there is one), and the file's own `true_false`
where it is stored. Intervals are 95 % Wilson intervals. Multiple choice is also
shown above chance: 0 is what guessing earns, 100 is all right.

`--out` writes the records, keyed by pid, with `strict_answer` and
`strict_true_false` added; `--scores` writes the table as JSON.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags

from data_pipelines import flags as command_line
from data_pipelines.scoring import grading, results

_HEADINGS = ("", "problems", "strict", "official", "stored", "above chance")


def rendered(scores: Mapping[str, Any]) -> str:
  """What `grading.summary` gives as lines of text; shares are in percent."""
  lines = [
    f"{scores['scored']} of {scores['records']} records scored "
    f"({scores['no_answer']} have no public answer); "
    f"{scores['no_response']} without a response count as wrong.",
    f"Official: of {scores['stored_extractions']} stored extractions and "
    f"{scores['scored'] - scores['stored_extractions']} responses, without a "
    "language model.",
  ]
  agreement = scores["agreement"]
  if agreement:
    lines.append(
      "Strict against {labelled} stored labels: right for {missed_wrong} of "
      "{wrong} labelled wrong, wrong for {missed_right} of {right} labelled "
      "right.".format(**agreement)
    )
  cells = [_HEADINGS, *_cells(scores["rows"])]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines += [
    "",
    *(
      "  ".join(
        [row[0].ljust(widths[0])]
        + [
          cell.rjust(width)
          for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
      ).rstrip()
      for row in cells
    ),
  ]
  return "\n".join(lines)


def _cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
  above = None
  for row in rows:
    if row["dimension"] != above:
      above = row["dimension"]
      yield (above,) + ("",) * (len(_HEADINGS) - 1)
    yield (
      f"  {row['name']}",
      str(row["strict"]["problems"]),
      _percent(row["strict"]),
      _percent(row["official"]),
      _percent(row["stored"]),
      _percent(row["multi_choice"]),
    )


def _percent(share: Mapping[str, float] | None) -> str:
  if share is None:
    return "-"
  value, low, high = (100 * share[name] for name in ("share", "low", "high"))
  return f"{value:5.1f} [{low:5.1f}, {high:5.1f}]"


def run(path: str, *, out: str, scores: str) -> str:
  """Scores a file, writes what is asked for, and returns what to print.

  Args:
    path: The results file.
    out: Where to write the records; "" for nowhere.
    scores: Where to write the table; "" for nowhere.

  Raises:
    ResultsError: The file, or where to write, must change first.
  """
  named = [os.path.realpath(name) for name in (path, out, scores) if name]
  if len(set(named)) < len(named):
    raise results.ResultsError(
      f"results file ({path!r}), --out ({out!r}) and --scores ({scores!r}) "
      "must be different files; name others."
    )
  graded = [grading.grade(result) for result in results.read(path)]
  if not any(each.result.problem.has_answer for each in graded):
    raise results.ResultsError(
      f"results file ({path!r}) must have answers to score by, but has none, "
      "as the benchmark's test split; score testmini."
    )
  found = grading.summary(graded)
  _write("out", out, lambda: grading.strict_records(graded))
  _write("scores", scores, lambda: {"file": os.path.basename(path), **found})
  return rendered(found)


def _write(flag: str, path: str, value: Callable[[], Any]) -> None:
  """Writes JSON, whole or not at all, unless the path is empty."""
  if not path:
    return
  target = pathlib.Path(path)
  part = target.with_name(f".{target.name}.part")
  try:
    # Half of a surrogate pair, which UTF-8 lacks, is left as JSON spells it.
    with open(part, "w", encoding="utf-8", errors="backslashreplace") as file:
      json.dump(value(), file, indent=2, ensure_ascii=False)
      file.write("\n")
    part.replace(target)
  except OSError as error:
    part.unlink(missing_ok=True)
    raise results.ResultsError(
      f"--{flag} ({path!r}) must be a file that can be written: {error}; name "
      "another."
    ) from error


FLAGS = flags.FLAGS


def _define_flags() -> None:
  """The flags of the command; for its importers there are none."""
  flags.DEFINE_string(
    "out", "", "Where to write the records with their strict answers, as JSON."
  )
  flags.DEFINE_string("scores", "", "Where to write the table, as JSON.")


def main(argv: Sequence[str]) -> None:
  """Scores what the flags name; exits 64 where that cannot be done."""
  try:
    if len(argv) != 2:
      raise results.ResultsError(
        f"arguments ({argv[1:]}) must be one results file; see --help."
      )
    print(run(argv[1], out=FLAGS.out, scores=FLAGS.scores))
  except results.ResultsError as error:
    command_line.refuse(error)


if __name__ == "__main__":
  _define_flags()
  app.run(main, flags_parser=command_line.parse)
