"""Reads a source and divides its records into the splits of a data dir."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, NoReturn

from absl import logging

from data_pipelines import validation
from data_pipelines.sources import (
  exclusion,
  intake,
  near_duplicates,
  origin,
  splits,
  stored,
)
from data_pipelines.sources.origin import Request
from data_pipelines.sources.rows import columns


class Division(NamedTuple):
  """The records of each split, and those that are in none."""

  by_split: dict[str, list[intake.Record]]
  rejects: list[intake.Reject]
  withheld: dict[str, list[str]]  # Pids and their twins by reason.


def divide(
  options: Request,
  source: origin.Origin,
  scratch: stored.Scratch,
  *,
  salt: str,
  num_workers: int,
) -> Division:
  """Checks the records of a source, and gives each one its split.

  `scratch` gets the usable problems. Another salt is another division.
  """
  names = list(source.readers)
  are_ours = isinstance(options.source, Mapping)
  places = splits.plan(names, options.split, are_ours=are_ours)
  near, looks = options.near_duplicates, near_duplicates.Looks(scratch)
  look_at_excluded = bool(options.exclude) and near != "none"
  reading = {"with_looks": look_at_excluded, "num_workers": num_workers}
  excluded = exclusion.read(options.exclude, scratch, looks, **reading)
  checker = intake.Checker(
    chosen=origin.choose_columns(source, options.columns, places),
    settings=columns.Settings(options.unchecked_answers, options.tolerance),
    with_looks=near == "perceptual" or look_at_excluded,
  )
  counts = [source.counts.get(name) for name in places]
  records, rejects = intake.check_records(
    {name: source.readers[name] for name in places},
    checker,
    scratch,
    looks,
    num_workers=num_workers,
    total=None if None in counts else sum(filter(None, counts)),
  )
  _limit_rejects(options, len(records), rejects)
  if names not in ([""], [origin.SYNTHETIC]):
    logging.info("%s", splits.describe(places, names))
  sides = splits.assign(
    records, places, salt=salt, eval_fraction=options.eval_fraction
  )
  withheld, reasons = splits.withhold(
    records, sides, near=near, looks=looks, excluded=excluded
  )
  if reasons:
    logging.warning("Withheld from train: %s.", _list_examples(reasons))
  found: dict[str, list[intake.Record]] = {}
  for index, record in enumerate(records):
    if index not in withheld:
      found.setdefault(sides[index], []).append(record)
  if reasons and "train" not in found:
    _refuse_to_withhold_all(options, reasons)
  _require_both_sides(options, places, found, salt)
  kept = {side: found[side] for side in splits.OURS if side in found}
  return Division(kept, rejects, reasons)


def count_reasons(rejects: Sequence[intake.Reject]) -> dict[str, int]:
  """The number of rejected records for each reason, by name."""
  counts = collections.Counter(reject.reason for reject in rejects)
  return dict(sorted(counts.items()))


def _limit_rejects(
  options: Request, num_accepted: int, rejects: Sequence[intake.Reject]
) -> None:
  total = num_accepted + len(rejects)
  if not total:
    raise validation.SettingError(
      f"source ({str(options.source)!r}) must hold at least one record."
    )
  # The limit is below 1, so at least one record is accepted.
  if len(rejects) / total <= options.max_reject_fraction:
    return
  reasons = count_reasons(rejects).items()
  counts = ", ".join(f"{n} {why}" for why, n in reasons)
  first = rejects[0]
  where = f" of {first.split}" if first.split else ""
  where += f", pid {first.pid}" if first.pid else ""
  raise validation.SettingError(
    f"{len(rejects)} of {total} records are unusable ({counts}); the limit is "
    f"max_reject_fraction ({options.max_reject_fraction}). The first one: "
    f"record {first.index}{where}, {first.reason}: {first.detail}. "
    "Fix the source, choose its columns with --columns or its "
    "splits with --split, or raise --max_reject_fraction."
  )


def _list_examples(found: Mapping[str, Sequence[str]]) -> str:
  """Each reason with its number of records, and three of them."""
  return "; ".join(
    f"{len(pairs)} {reason} ({validation.printable(', '.join(pairs[:3]))})"
    for reason, pairs in found.items()
  )


_REMEDIES = {
  "same": (
    "add --near_duplicates=none to keep them, or evaluate on other data with "
    "--source=train=PATH,eval=PATH"
  ),
  "similar": "use --near_duplicates=exact",
  "excluded": "name other data dirs in --exclude",
}


def _refuse_to_withhold_all(
  options: Request, reasons: Mapping[str, Sequence[str]]
) -> NoReturn:
  most = max(reasons, key=lambda reason: len(reasons[reason]))
  kind = most.partition("_")[0]
  name = "exclude" if kind == "excluded" else "near_duplicates"
  value = getattr(options, name)
  raise validation.SettingError(
    f"{name} ({value!r}) must leave problems to train, but all are withheld: "
    f"{_list_examples(reasons)}; {_REMEDIES[kind]}."
  )


def _require_both_sides(
  options: Request,
  places: Mapping[str, str],
  found: Mapping[str, Sequence[intake.Record]],
  salt: str,
) -> None:
  """Refuses a division that leaves either train or eval without problems."""
  counts = {side: len(found.get(side, ())) for side in ("train", "eval")}
  if (counts["train"] > 0) == (counts["eval"] > 0):
    return
  if "eval" in places.values():
    kept = [repr(name) for name, ours in places.items() if ours != "eval"]
    if counts["train"]:
      raise validation.SettingError(
        f"split ({','.join(options.split)!r}) must leave problems to eval, but "
        "no record that the source has for it has an answer; divide the others "
        f"with --split={','.join(kept)}."
      )
    return
  divided = splits.DIVIDED in places.values()
  if not divided or not 0 < options.eval_fraction < 1:
    return
  side = "train" if counts["train"] else "eval"
  groups = {record.groups[0] for record in found[side]}
  but = f"train gets {counts['train']} problems and eval {counts['eval']}"
  remedy = "give more problems, or set --eval_fraction=0 for no eval"
  if len(groups) > 1:
    ordered = sorted(splits.position(group, salt) for group in groups)
    low, high = ordered[:2] if side == "train" else ordered[-2:]
    # The shortest number between the two.
    for digits in range(11, 0, -1):
      value = math.ceil((low + (high - low) / 4) * 10**digits) / 10**digits
      if low < value <= high:
        remedy = f"set --eval_fraction={value}, or give more problems"
  elif counts[side] > 1:
    what = "question" if groups.pop().startswith("text-") else "image"
    pids = ", ".join(record.pid for record in found[side][:3])
    but = f"all {counts[side]} records ({pids}, ...) have the same {what}, and "
    but += "what shares one is never divided"
    remedy = (
      "leave an image that says nothing out of the source, give eval data of "
      "its own with --source=train=PATH,eval=PATH, or set --eval_fraction=0 "
      "for no eval"
    )
  raise validation.SettingError(
    f"eval_fraction ({options.eval_fraction}) must leave problems to both "
    f"splits, but {but}; {remedy}."
  )
