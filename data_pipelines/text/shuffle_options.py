"""Shuffles the options of a question, for training only.

Published answers are skewed to the first letters, and a policy could learn the
skew instead of reading images. The answer is the option's text, so only the
letters move. A problem whose words depend on the order keeps its order.
"""

import dataclasses
import re

import numpy as np

from data_pipelines import records

# Nouns before a letter that names an option.
_NOUN = (
  r"(?i:options?|choices?|answers?|figures?|fig\.?|pictures?|images?|diagrams?"
  r"|graphs?|panels?|parts?|letters?|statements?|cases?)"
)
_ORDINALS = r"(?i:first|second|third|fourth|fifth|sixth|last|next|previous)"
# "option B", "the answer is D", "figure (a)", "(C)", "B)" at the start of a
# line, "the first option".
_REFERENCE = re.compile(
  rf"\b{_NOUN}\s*(?:is|are|:)?\s*[(\[$]*[A-Z](?![\w'])"
  rf"|\b{_NOUN}\s*\(\s*[a-z]\s*\)"
  r"|[(\[]\s*[A-Z]\s*[)\]]"
  r"|(?:\A|\n)\s*[A-Z]\s*[).:]"
  rf"|\b{_ORDINALS}\s+(?i:options?|choices?|answers?)\b"
  r"|(?:选项|答案|图)\s*(?:是|为|:)?\s*[(\uff08]?[A-Z](?![A-Za-z])"
  r"|\uff08\s*[A-Z]\s*\uff09"
)
# "None of the above", "both", "the former".
_RELATIVE = re.compile(
  r"\b(?:above|below|both|former|latter|preceding|previous|following|these)\b"
  r"|以上|上述|前者|后者",
  re.IGNORECASE,
)
# Only Latin letters separate, because Chinese may touch one. Not the article A.
_LONE_LETTER = re.compile(
  r"(?<![A-Za-z0-9])(?:[B-Z]|A(?!\s+[a-z]))(?![A-Za-z0-9])"
)


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
    any(map(_REFERENCE.search, (problem.question, problem.solution)))
    or any(
      letters & set(_LONE_LETTER.findall(text))
      for text in (problem.solution, *problem.choices)
    )
    or any(map(_RELATIVE.search, problem.choices))
    or problem.query != records.official_query(problem)
  )
