"""Decides which record trains, which is evaluated, and which is withheld.

A record's side depends on the source's own splits or on a hash of the record,
so that others never move it. docs/adr/0006 has the reasons.
"""

import collections
import hashlib
from collections.abc import Iterable, Mapping, Sequence

from data_pipelines import validation
from data_pipelines.sources import near_duplicates
from data_pipelines.sources.intake import Record

OURS = ("train", "eval", "test")
# The place of a source split whose records are divided into train and eval.
DIVIDED = "divided"
_VALIDATION = ("validation", "valid", "val", "dev", "eval", "evaluation")


def plan(
  names: Sequence[str], given: Sequence[str] = (), *, are_ours: bool = False
) -> dict[str, str]:
  """The place of each split that is used: one of `OURS`, or `DIVIDED`.

  `given` are names to divide, or pairs such as "eval=validation". Names that
  `are_ours` begin with our own, as "train/part".
  """
  if are_ours:
    chosen = {name: name.partition("/")[0] for name in names}
  elif given:
    chosen = _choose(names, given)
  else:
    chosen = _by_name(names)
  if "eval" in chosen.values():
    return chosen
  return {x: DIVIDED if y == "train" else y for x, y in chosen.items()}


def _choose(names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
  chosen = {}
  for item in given:
    ours, sign, name = item.strip().rpartition("=")
    known = ours in OURS if sign else True
    if name not in names or name in chosen or not known:
      listed = ", ".join(repr(each) for each in names)
      raise validation.SettingError(
        f"split ({','.join(given)!r}) must be names of splits, or pairs of one "
        f"of {', '.join(OURS)} and a name, each once; the source has {listed}, "
        f"and {item!r} is neither."
      )
    chosen[name] = ours if sign else DIVIDED
  if DIVIDED in chosen.values() and len(set(chosen.values())) > 1:
    raise validation.SettingError(
      f"split ({','.join(given)!r}) must be names or pairs, not both."
    )
  return chosen


def _by_name(names: Sequence[str]) -> dict[str, str]:
  """Splits whose names say what they are, if there are all that it takes."""
  folded = {name: name.casefold() for name in names}
  found = set(folded.values())
  has_validation = bool(found.intersection(_VALIDATION))
  if "train" not in found or not (has_validation or "test" in found):
    return dict.fromkeys(names, DIVIDED)
  places = dict.fromkeys(_VALIDATION, "eval") | {"train": "train"}
  places["test"] = "test" if has_validation else "eval"
  return {name: places[each] for name, each in folded.items() if each in places}


def describe(places: Mapping[str, str], names: Sequence[str]) -> str:
  """Where each split goes, in one line for the log."""
  parts = []
  for name, ours in places.items():
    divided = f"{name!r} is divided into train and eval"
    parts.append(divided if ours == DIVIDED else f"{ours} is {name!r}")
  if left_out := [repr(name) for name in names if name not in places]:
    parts.append(f"left out: {', '.join(left_out)} (--split takes them too)")
  return f"Splits of the source: {'; '.join(parts)}."


def position(group: str, salt: str) -> float:
  """Where a group stands between 0, the first in eval, and 1."""
  digest = hashlib.sha256(f"{salt}|{group}".encode()).digest()
  return int.from_bytes(digest[:8]) / 2**64


def assign(
  records: Sequence[Record],
  places: Mapping[str, str],
  *,
  salt: str,
  eval_fraction: float,
) -> list[str]:
  """The split of each record, from itself alone, of its first image."""
  sides = []
  for record in records:
    side = "test" if record.is_hidden else places[record.split]
    if side == DIVIDED:
      place = position(record.groups[0], salt)
      side = "eval" if place < eval_fraction else "train"
    sides.append(side)
  return sides


def withhold(
  records: Sequence[Record],
  sides: Sequence[str],
  *,
  near: str,
  looks: near_duplicates.Looks,
  excluded: Mapping[str, str],
) -> tuple[set[int], dict[str, list[str]]]:
  """The indices of the records of `train` that are withheld, and the reasons.

  Each reason, in order, has every pid with its twin, as "pid ~ pid".
  `near` says what `train` loses to other sides: "exact", "perceptual" or
  "none". `excluded` are the groups that must not train, each with a name.
  """
  held: dict[str, str] = {}
  for record, side in zip(records, sides, strict=True):
    for group in record.groups if side != "train" and near != "none" else ():
      held.setdefault(group, record.pid)
  trained = [i for i, side in enumerate(sides) if side == "train"]
  shown = dict.fromkeys(group for i in trained for group in records[i].groups)
  similar = looks.find(shown, held) if near == "perceptual" else {}
  alike = looks.find(shown, excluded) if near != "none" else {}
  rules = [
    ("same", held, {}),
    ("similar", held, similar),
    ("excluded_same", excluded, {}),
    ("excluded_similar", excluded, alike),
  ]
  withheld: set[int] = set()
  reasons: dict[str, list[str]] = collections.defaultdict(list)
  for i in trained:
    for kind, twins, copies in rules:
      groups = [copies.get(group, group) for group in records[i].groups]
      names = [twins[group] for group in groups if group in twins]
      if names:
        what = "question" if records[i].groups[0][:5] == "text-" else "image"
        withheld.add(i)
        reasons[f"{kind}_{what}"].append(f"{records[i].pid} ~ {names[0]}")
        break
  return withheld, dict(sorted(reasons.items()))


def fingerprint(chosen: Mapping[str, Iterable[Record]]) -> str:
  """One hash of all records of the splits, in any order."""
  lines = sorted(
    f"{split} {record.digest}\n"
    for split, found in chosen.items()
    for record in found
  )
  return hashlib.sha256("".join(lines).encode()).hexdigest()
