"""We-Math's rule for letters, and its metric over the steps of a problem.

References:
  https://github.com/We-Math/We-Math (evaluation/);
  https://arxiv.org/abs/2407.01284 (the four dimensions).
"""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipelines import records
from data_pipelines.scoring.official.golds import official_answer

_IGNORED = re.compile("[<>:.]")
_KEY = re.compile(r"([23])steps_([123]|multi)")


def extraction(completion: str, problem: records.Problem) -> str:
  """The capital letter right behind the last "Answer"; "" if there is none."""
  del problem
  _, _, rest = completion.rpartition("Answer")
  rest = _IGNORED.sub("", rest.strip()).strip()
  return rest[:1] if rest[:1] in tuple("ABCDEFGH") else ""


def is_right(extraction: str, problem: records.Problem) -> bool:
  """True if the letter is the gold's."""
  return extraction == official_answer(problem)


def steps_metric(
  graded: Iterable[tuple[Mapping[str, Any], bool]],
) -> dict[str, Any] | None:
  """We-Math's figures, from the `metadata` of each record and its grade.

  A problem of two or three steps is asked as a whole and step by step. All
  steps right and the whole wrong is inadequate generalization (IG), a step and
  the whole wrong is insufficient knowledge (IK). If the whole is right, it is
  complete mastery (CM) with the steps right, or else rote memorization (RM):
  "strict" asks for all steps, "loose" for one.

  Returns:
    `problems`, the number of problems asked in all parts; the shares of right
    answers to `one_step`, `two_step` and `three_step` questions; `IK` and `IG`;
    and for "strict" and "loose" `CM`, `RM`, `RM_rate` and `score`, which is
    1 - (IG / 2 + IK + RM) / problems. None if no problem is complete.
  """
  problems = collections.defaultdict(dict)
  for metadata, is_right in graded:
    if match := _KEY.fullmatch(str(metadata.get("key"))):
      problems[int(match[1]), str(metadata.get("ID"))][match[2]] = is_right
  whole = [
    (steps, [parts[str(i + 1)] for i in range(steps)], parts["multi"])
    for (steps, _), parts in problems.items()
    if len(parts) == steps + 1
  ]
  if not whole:
    return None
  found: dict[str, Any] = {
    "problems": len(whole),
    "one_step": _mean([part for _, parts, _ in whole for part in parts]),
    "two_step": _mean([multi for steps, _, multi in whole if steps == 2]),
    "three_step": _mean([multi for steps, _, multi in whole if steps == 3]),
    "IK": sum(not all(parts) and not multi for _, parts, multi in whole),
    "IG": sum(all(parts) and not multi for _, parts, multi in whole),
  }
  for name, knows in (("strict", all), ("loose", any)):
    mastery = sum(knows(parts) and multi for _, parts, multi in whole)
    rote = sum(multi for *_, multi in whole) - mastery
    lost = found["IG"] / 2 + found["IK"] + rote
    found[name] = {
      "CM": mastery,
      "RM": rote,
      "RM_rate": rote / (mastery + rote) if mastery + rote else None,
      "score": 1 - lost / len(whole),
    }
  return found


def _mean(marks: list[bool]) -> float | None:
  return sum(marks) / len(marks) if marks else None
