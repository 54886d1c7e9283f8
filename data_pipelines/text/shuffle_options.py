"""Shuffles the options of a question, for training only.

Published answers are skewed to the first letters, and a policy could learn the
skew instead of reading images. The answer is the option's text, so only the
letters move. A problem whose words depend on the order keeps its order.
"""

import dataclasses

import numpy as np

from data_pipelines import records, tables

_RE = tables.patterns("shuffle_options")


def shuffle(
  problem: records.Problem, rng: np.random.Generator
) -> records.Problem:
  """The problem with its options in a random order, also in the query.

  A problem whose order `is_fixed` is returned unchanged.
  """
  if is_fixed(problem):
    return problem
  order = rng.permutation(len(problem.choices))
  choices = tuple(problem.choices[i] for i in order)
  changed = dataclasses.replace(problem, choices=choices)
  return records.with_official_query(changed)


def is_fixed(problem: records.Problem) -> bool:
  """True if there are no options to move, or if they must keep their order.

  They must if the question or the solution refers to one by letter or position,
  if an option is or contains such a letter or refers to other options, or if
  the query differs from the official layout.
  """
  if problem.question_type != "multi_choice" or len(problem.choices) < 2:
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
    or problem.query != records.official_query(problem)
  )
