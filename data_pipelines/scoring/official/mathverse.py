"""MathVerse's quick match: the extracted answer is the gold, letter by letter.

Extraction, and the judgement that MathVerse publishes, ask a language model.
Without one the whole completion is the extraction, which is far too strict for
anything but a bare answer. Its score of reasoning steps (CoT-E) has no rule at
all.

References:
  https://github.com/ZrrSkywalker/MathVerse (evaluation/, --quick_match).
"""

from data_pipelines import records
from data_pipelines.scoring.official.golds import official_answer

_LEAD_IN = "Extracted Answer: "


def is_right(extraction: str, problem: records.Problem) -> bool:
  """True if the extraction is the gold; a letter for an option."""
  return extraction.replace(_LEAD_IN, "").strip() == official_answer(problem)
