"""Shuffles the options of a question, for training only.

Published answers are skewed to the first letters, and a policy could learn the
skew instead of reading images. The answer is the option's text, so only the
letters move. A problem whose words depend on the order keeps its order.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from data_pipelines import records
from data_pipelines.text import tables

_RE = tables.patterns("shuffle_options")


def shuffle(
  problem: records.Problem, rng: np.random.Generator
) -> records.Problem:
  """The problem with its options in a random order, unless that `is_fixed`."""
  layout = None if is_fixed(problem) else _layout(problem)
  if layout is None:
    return problem
  order = rng.permutation(len(problem.choices))
  choices = tuple(problem.choices[i] for i in order)
  changed = dataclasses.replace(problem, choices=choices)
  return dataclasses.replace(changed, query=layout(changed))


def is_fixed(problem: records.Problem) -> bool:
  """True if there are no options to move, or if they must keep their order.

  They must if a text may refer to one by letter or position, or if the query is
  neither the official nor the plain one.
  """
  is_choice = problem.question_type == "multi_choice"
  if not is_choice or len(problem.choices) < 2 or problem.completions:
    return True
  letters = {chr(65 + i) for i in range(len(problem.choices))}
  # A lone letter in a worked solution can only be an option's.
  return (
    any(map(_RE.reference.search, (problem.question, problem.solution)))
    or any(
      letters & set(_RE.lone_letter.findall(text))
      for text in (problem.solution, *problem.choices)
    )
    or any(map(_RE.relative.search, problem.choices))
    or any(records.IMAGE_MARK in text for text in problem.choices)
    or _layout(problem) is None
  )


def _layout(
  problem: records.Problem,
) -> Callable[[records.Problem], str] | None:
  """The function that has written the problem's query."""
  layouts = (records.official_query, records.plain_query)
  return next((x for x in layouts if x(problem) == problem.query), None)
