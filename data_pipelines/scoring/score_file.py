"""Scores a results file: grades it, writes the figures, formats a table."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines.scoring import grading, results
from data_pipelines.scoring.official import rules
from data_pipelines.validation import printable


def score_file(path: str, *, out: str = "", scores: str = "") -> str:
  """Scores a results file and returns the table as text.

  `out` is a file for the records with their strict answers, `scores` one for
  the figures as JSON; "" writes none.

  Raises:
    SettingError: The file cannot be scored, or an output cannot be written.
  """
  results.check_different([name for name in (path, out, scores) if name])
  read = results.read(path)
  graded = list(map(grading.grade, read, grading.verdicts(read)))
  if not any(each.result.problem.is_checkable for each in graded):
    raise results.error_in(
      path,
      "have public answers, but has none, like the benchmark's test split",
      "score testmini",
    )
  found = grading.summary(graded)
  if out:
    results.write_json("out", out, grading.strict_records(graded))
  if scores:
    figures = {"file": os.path.basename(path), **found}
    results.write_json("scores", scores, figures)
  return format_scores(found)


def format_scores(scores: Mapping[str, Any]) -> str:
  """Formats `grading.summary` as lines of text, with shares in percent."""
  external = scores["stored_extractions"]
  lines = [
    f"{scores['scored']} of {scores['records']} records scored "
    f"({scores['no_answer']} have no public answer); "
    f"{scores['no_response']} without a response count as wrong.",
    "strict: the verifier of this program, on the response.",
    *(
      f"{way}: the rule of {rules.TITLES[rule]}, for {count} records."
      for rule, (way, count) in scores["official_rules"].items()
    ),
    "stored: the labels (true_false) of the program that wrote the file.",
    f"An external program has extracted {external} answers; of the other "
    f"{scores['scored'] - external} records the official rules read the whole "
    "response, without a language model.",
  ]
  if scores["agreement"]:
    lines.append(
      "Strict grades against {labelled} stored labels: right for "
      "{missed_wrong} of {wrong} labelled wrong, wrong for {missed_right} of "
      "{right} labelled right.".format(**scores["agreement"])
    )
  for way, found in scores["wemath"].items():
    figures = ", ".join(f"{name} {x:.4g}" for name, x in found.items())
    lines.append(f"We-Math's metric by {way} grades: {figures or 'none'}.")
  cells = list(_cells(scores["rows"]))
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  lines.append("")
  for first, *rest in cells:
    columns = [first.ljust(widths[0])]
    columns += [x.rjust(w) for x, w in zip(rest, widths[1:], strict=True)]
    lines.append("  ".join(columns).rstrip())
  return "\n".join(lines)


def _cells(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
  """The headings, and the cells of each row below that of its dimension."""
  ways = [x for x in rows[0] if x not in ("dimension", "name", "multi_choice")]
  yield ("", "problems", *ways, "above chance")
  dimension = None
  for row in rows:
    if row["dimension"] != dimension:
      dimension = row["dimension"]
      yield (dimension, *("",) * (len(ways) + 2))
    yield (
      f"  {printable(row['name'])}",
      str(row["strict"]["problems"]),
      *(_percent(row[way]) for way in ways),
      _percent(row["multi_choice"]),
    )


def _percent(share: Mapping[str, float] | None) -> str:
  if share is None:
    return "-"
  value, low, high = (100 * share[name] for name in ("share", "low", "high"))
  return f"{value:5.1f} [{low:5.1f}, {high:5.1f}]"
