"""The reward for the format of the answer."""

from data_pipelines.verifier import verify

_OPEN, _CLOSE = "<answer>", "</answer>"


def well_formed(completion: str) -> float:
  """1 for one <answer>...</answer> that holds a letter or digit; else 0.

  Tags in the thinking do not count. Punctuation alone scores 0, so copying the
  instruction's "..." does not help.
  """
  visible = verify.without_thinking(completion) or ""
  if visible.count(_OPEN) != 1 or visible.count(_CLOSE) != 1:
    return 0.0
  inside = visible.partition(_OPEN)[2].partition(_CLOSE)
  return float(bool(inside[1]) and any(map(str.isalnum, inside[0])))


def reasoning(completion: str) -> str:
  """The completion outside its first <answer> tag."""
  before, _, rest = completion.partition(_OPEN)
  _, closed, after = rest.partition(_CLOSE)
  return f"{before}\n{after}" if closed else before
