"""The official rules by name: which set has which, and what each says.

A prepared problem names its rule in `metadata["official_rule"]`, and keeps the
gold as the set has it in `metadata["official_answer"]`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_pipelines import records
from data_pipelines.scoring import figures
from data_pipelines.scoring.official import (
  chartqa,
  mathverse,
  mathvision,
  mathvista,
  wemath,
)
from data_pipelines.sources.rows.mathvista import is_original
from data_pipelines.text import tables

_TABLES = tables.read("data_pipelines.scoring.official", "rules.toml")
TITLES = {name: table["title"] for name, table in _TABLES.items()}
# How each rule finds an answer, and how it judges it.
_RULES = {
  "chartqa": (str.strip, chartqa.is_right),
  "mathverse": (str.strip, mathverse.is_right),
  "mathvision": (mathvision.extraction, mathvision.is_right),
  "mathvista": (mathvista.extraction, mathvista.is_right),
  "wemath": (wemath.extraction, wemath.is_right),
}


def columns(
  graded: Iterable[tuple[str, str, bool | None]],
) -> dict[str, list[bool | None]]:
  """For each rule, its grade of each record; None for those of other sets.

  A record is `graded` by its pid, the name of its rule and its grade; one that
  an evaluation could not read is wrong in each column.
  """
  graded = list(graded)
  return {
    name: [
      mark if rule == name else False if figures.is_unreadable(pid) else None
      for pid, rule, mark in graded
    ]
    for name in sorted({rule for _, rule, _ in graded} - {""})
  }


def find(sample: Sequence[Mapping[str, Any]], known: Mapping[str, str]) -> str:
  """The name of the rule of the set that has such columns; "" for none.

  `known` has the columns by their names in small letters with "_".
  """
  for name, table in _TABLES.items():
    for signature in table["signatures"]:
      if signature.keys() <= known.keys() and all(
        row.get(known[column]) in values
        for column, values in signature.items()
        for row in sample
        if values
      ):
        return name
  return ""


def name_of(problem: records.Problem) -> str:
  """The name of the problem's official rule; "" if it has none."""
  name = problem.metadata.get("official_rule")
  if isinstance(name, str):
    return name if name in TITLES else ""
  return "mathvista" if is_original(problem.metadata) else ""


def is_right(
  name: str, response: str, extraction: Any, problem: records.Problem
) -> bool | None:
  """Judges a response by the rule of that name; None without a rule.

  `extraction` is what an external program has found in it; None for nothing.
  """
  if not name:
    return None
  extract, judge = _RULES[name]
  if extraction is None:
    extraction = extract(response)
  return problem.is_checkable and judge(str(extraction), problem)
