"""The options of a question in another order, for training alone.

Published answers are skewed to the first letters, and a policy that learns the
skew has learnt nothing of pictures. The answer is the option's text, so it is
the letters that move. A problem whose words depend on the order keeps it.
"""

import dataclasses
import re

import numpy as np

from data_pipelines import records

# What a letter is said to be the name of, in a question or a solution.
_NAMED = (
  r"(?i:options?|choices?|answers?|figures?|fig\.?|pictures?|images?|diagrams?"
  r"|graphs?|panels?|parts?|letters?|statements?|cases?)"
)
_ORDINALS = r"(?i:first|second|third|fourth|fifth|sixth|last|next|previous)"
# "option B", "the answer is D", "figure (a)", "(C)", "B)" that opens a line,
# "the first option".
_REFERS = re.compile(
  rf"\b{_NAMED}\s*(?:is|are|:)?\s*[(\[$]*[A-Z](?![\w'])"
  rf"|\b{_NAMED}\s*\(\s*[a-z]\s*\)"
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
# Of Latin letters alone, for Chinese may touch one. Not A as an article.
_LONE_LETTER = re.compile(
  r"(?<![A-Za-z0-9])(?:[B-Z]|A(?!\s+[a-z]))(?![A-Za-z0-9])"
)


def shuffle(
  problem: records.Problem, rng: np.random.Generator
) -> records.Problem:
  """The problem with its options in a drawn order, in the query too.

  The same problem if its order `is_fixed`.
  """
  if is_fixed(problem):
    return problem
  order = rng.permutation(len(problem.choices))
  choices = tuple(problem.choices[i] for i in order)
  changed = dataclasses.replace(problem, choices=choices)
  return dataclasses.replace(changed, query=_query(changed))


def is_fixed(problem: records.Problem) -> bool:
  """Whether the options must stay as they are, if there are any.

  So they do where the question or the solution refers to one by letter or by
  place, where an option is or holds such a letter or speaks of other options,
  and where the query is not laid out as the official ones are.
  """
  if problem.question_type != "multi_choice" or len(problem.choices) < 2:
    return True
  letters = {chr(65 + i) for i in range(len(problem.choices))}
  # A worked solution has no other use for a lone letter: it is an option's.
  return (
    any(map(_REFERS.search, (problem.question, problem.solution)))
    or any(
      letters & set(_LONE_LETTER.findall(text))
      for text in (problem.solution, *problem.choices)
    )
    or any(map(_RELATIVE.search, problem.choices))
    or problem.query != _query(problem)
  )


def _query(problem: records.Problem) -> str:
  return records.official_query(
    question=problem.question,
    choices=problem.choices,
    unit=problem.unit,
    precision=problem.precision,
    question_type=problem.question_type,
    answer_type=problem.answer_type,
  )
