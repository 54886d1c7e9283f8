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


def extraction(completion: str) -> str:
  """The capital letter right behind the last "Answer"; "" if there is none."""
  _, _, rest = completion.rpartition("Answer")
  rest = _IGNORED.sub("", rest.strip()).strip()
  return rest[:1] if rest[:1] in tuple("ABCDEFGH") else ""


def is_right(extraction: str, problem: records.Problem) -> bool:
  """True if the letter is the gold's."""
  return extraction == official_answer(problem)


def steps_metric(
  graded: Iterable[tuple[Mapping[str, Any], bool]],
) -> dict[str, float]:
  """We-Math's figures, from the `metadata` of each record and its grade.

  A problem of two or three steps is asked as a whole and step by step; those
  that were asked in all parts count. S1 is the share of right steps, S2 and S3
  of right wholes. Insufficient knowledge (IK) is a wrong step and a wrong
  whole, inadequate generalization (IG) a wrong whole in spite of right steps. A
  right whole is complete mastery (CM) or rote memorization (RM): "strict" asks
  for all steps, "loose" for one. What has no value is left out.
  """
  problems = collections.defaultdict(dict)
  for metadata, is_right in graded:
    if match := _KEY.fullmatch(str(metadata.get("key"))):
      problems[int(match[1]), str(metadata.get("ID"))][match[2]] = is_right
  whole = [
    ([parts[str(i + 1)] for i in range(steps)], parts["multi"])
    for (steps, _), parts in problems.items()
    if len(parts) == steps + 1
  ]
  marks = {
    "S1": [part for parts, _ in whole for part in parts],
    "S2": [multi for parts, multi in whole if len(parts) == 2],
    "S3": [multi for parts, multi in whole if len(parts) == 3],
  }
  found = {name: sum(x) / len(x) for name, x in marks.items() if x}
  if not whole:
    return found
  found["problems"] = len(whole)
  found["IK"] = sum(not (all(parts) or multi) for parts, multi in whole)
  found["IG"] = sum(all(parts) and not multi for parts, multi in whole)
  for name, knows in (("strict", all), ("loose", any)):
    mastery = sum(knows(parts) and multi for parts, multi in whole)
    rote = sum(multi for _, multi in whole) - mastery
    found |= {f"CM_{name}": mastery, f"RM_{name}": rote}
    if mastery + rote:
      found[f"RM_rate_{name}"] = rote / (mastery + rote)
    lost = found["IG"] / 2 + found["IK"] + rote
    found[f"score_{name}"] = 1 - lost / len(whole)
  return found
