"""The official rules by name: which set has which, and what each says.

A prepared problem names its rule in `metadata["official_rule"]`, and keeps the
gold as the set has it in `metadata["official_answer"]`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

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
_MODULES = {
  "mathvista": mathvista,
  "chartqa": chartqa,
  "mathverse": mathverse,
  "mathvision": mathvision,
  "wemath": wemath,
}


class Grade(NamedTuple):
  """A record's pid, the name of its rule or "", and what the rule says."""

  pid: str
  rule: str
  is_right: bool | None


def columns(graded: Iterable[Grade]) -> dict[str, list[bool | None]]:
  """For each rule, its grade of each record; None for those of other sets.

  What an evaluation could not read counts as wrong in each column.
  """
  graded = list(graded)
  return {
    rule: [
      each.is_right
      if each.rule == rule
      else False
      if figures.is_unreadable(each.pid)
      else None
      for each in graded
    ]
    for rule in sorted({each.rule for each in graded} - {""})
  }


def find(sample: Sequence[Mapping[str, Any]], known: Mapping[str, str]) -> str:
  """The name of the rule of the set that has such columns; "" for none.

  Args:
    sample: The first rows.
    known: The columns by their names in small letters with "_".
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
  name: str, response: str, extraction: str | None, problem: records.Problem
) -> bool:
  """Judges a response by the rule of that name.

  Args:
    name: One of `TITLES`.
    response: The completion.
    extraction: The answer in it that an external program has found, if any.
    problem: The question.
  """
  rule = _MODULES[name]
  if extraction is None:
    extraction = rule.extraction(response, problem)
  return problem.is_checkable and rule.is_right(extraction, problem)
