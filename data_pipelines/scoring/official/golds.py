"""The gold of a problem as its own set spells it."""

from data_pipelines import records


def official_answer(problem: records.Problem) -> str:
  """The gold that `prepare` stored; else the answer, or its option's letter."""
  stored = problem.metadata.get("official_answer")
  if isinstance(stored, str):
    return stored
  if problem.answer in problem.choices:
    return chr(ord("A") + problem.choices.index(problem.answer))
  return problem.answer
