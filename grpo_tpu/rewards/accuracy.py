"""Rewards that look at the answer: is it right, and is it where it belongs."""

from data_pipelines.verifier import verify

_OPEN, _CLOSE = "<answer>", "</answer>"


def accuracy(verdict: verify.Verdict) -> float:
  """1 for the right answer, however it is written; else 0."""
  return float(verdict.correct)


def well_formed(completion: str) -> float:
  """1 for exactly one <answer>...</answer> that holds something; else 0.

  Marks alone are nothing, so the "..." of the instruction earns nothing when
  it is copied.
  """
  if completion.count(_OPEN) != 1 or completion.count(_CLOSE) != 1:
    return 0.0
  inside = completion.partition(_OPEN)[2].partition(_CLOSE)
  return float(bool(inside[1]) and any(map(str.isalnum, inside[0])))


def reasoning(completion: str) -> str:
  """The completion outside its first <answer> tag."""
  before, _, rest = completion.partition(_OPEN)
  _, closed, after = rest.partition(_CLOSE)
  return f"{before}\n{after}" if closed else before
