"""ChartQA's relaxed accuracy: a number may be off by 5 %, a text by nothing.

The whole completion is the answer, so prompts must ask for nothing else.

References:
  Section 5.1 of https://arxiv.org/abs/2203.10244; the program that others
  follow: https://github.com/google-research/pix2struct (metrics.py).
"""

from data_pipelines import records
from data_pipelines.scoring.official.golds import official_answer

_TOLERANCE = 0.05


def is_right(extraction: str, problem: records.Problem) -> bool:
  """True if the gold is matched; 0, which has no relative error, as a text."""
  gold = official_answer(problem)
  found, right = _number(extraction), _number(gold)
  if found is None or not right:
    return extraction.lower() == gold.lower()
  return abs(found - right) / abs(right) <= _TOLERANCE


def _number(text: str) -> float | None:
  """The value of a text for Python; 5% is 0.05."""
  try:
    return float(text.rstrip("%")) / 100 if text[-1:] == "%" else float(text)
  except ValueError:
    return None
