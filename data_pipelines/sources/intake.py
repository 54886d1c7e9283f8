"""Which records of a source can be used, and which split each falls on.

A source is read more than once rather than held in memory: a first pass
remembers a few words of each record, later ones pick by them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines import images, records
from data_pipelines.sources import (
  folders,
  mathvista,
  near_duplicates,
  splits,
  synthetic,
)
from data_pipelines.verifier import verify

# The side of what a twin in `eval` or `test` keeps from being learnt.
WITHHELD = "withheld"


@dataclasses.dataclass(frozen=True)
class Kept:
  """What must be remembered of a usable record to place it."""

  at: tuple[str, int]  # The source's split, and the place in it.
  pid: str
  picture: str  # The hash of its pixels.
  group: str  # The pictures that are twins, by the smallest hash of them.
  has_answer: bool
  is_mathvista: bool
  digest: str


def sift(readers: folders.Readers) -> tuple[list[Kept], list[dict[str, Any]]]:
  """The usable records, and why the others are not."""
  kept: list[Kept] = []
  rejects: list[dict[str, Any]] = []
  looks: dict[str, near_duplicates.Look | None] = {}
  pids: set[str] = set()
  for split, reader in readers.items():
    for index, raw in enumerate(reader()):
      try:
        problem = _problem(raw)
        picture, look = _seen(problem)
        if problem.pid in pids:
          raise records.BadRecord("duplicate_pid", "another record has its pid")
      except records.BadRecord as error:
        why = {"reason": error.reason, "detail": error.detail}
        rejects.append(
          {"split": split, "index": index, "pid": _pid(raw), **why}
        )
        continue
      pids.add(problem.pid)
      if look is not None or picture not in looks:
        looks[picture] = look
      kept.append(
        Kept(
          at=(split, index),
          pid=problem.pid,
          picture=picture,
          group=picture,
          has_answer=problem.has_answer,
          is_mathvista=mathvista.is_original(problem.metadata),
          digest=_digest(problem),
        )
      )
  groups = near_duplicates.groups(looks)
  return [
    dataclasses.replace(record, group=groups[record.picture]) for record in kept
  ], rejects


def _problem(raw: folders.Raw) -> records.Problem:
  if isinstance(raw, records.BadRecord):
    raise raw
  return raw if isinstance(raw, records.Problem) else records.from_row(raw)


def _pid(raw: folders.Raw) -> Any:
  if isinstance(raw, Mapping):
    return raw.get("pid")
  return raw.pid if isinstance(raw, records.Problem) else None


def _seen(problem: records.Problem) -> tuple[str, near_duplicates.Look | None]:
  """The picture of a usable problem.

  Drawn pictures look alike by design and differ in their answers, so that
  only equal pixels make them twins.

  Raises:
    BadRecord: The problem cannot be asked, shown or scored.
  """
  records.validate(problem)
  image = images.decode(problem.image_bytes)
  if problem.has_answer:
    answer = verify.final_answer(problem)
    if not verify.verify(f"<answer>{answer}</answer>", problem).correct:
      raise records.BadRecord(
        "answer_fails_verifier", f"{answer!r} is not found right"
      )
  look = (
    None if synthetic.is_synthetic(problem) else near_duplicates.look(image)
  )
  return images.pixel_hash(image), look


def _digest(problem: records.Problem) -> str:
  example = records.to_example(problem)
  digest = hashlib.sha256(example.pop("image_bytes"))
  digest.update(json.dumps(example, sort_keys=True).encode())
  return digest.hexdigest()


def fingerprint(
  kept: Sequence[Kept], placed: Mapping[tuple[str, int], str]
) -> str:
  """One hash of all records and their splits, whatever their order."""
  lines = sorted(f"{placed[record.at]} {record.digest}\n" for record in kept)
  return hashlib.sha256("".join(lines).encode()).hexdigest()


def placed(
  kept: Sequence[Kept], *, salt: str, eval_fraction: float
) -> dict[tuple[str, int], str]:
  """The split of every record; no picture of `train` has a twin in another.

  A record draws its side by its own picture alone, so that no other record
  can move it. Where its group is not of one mind, or is shown in `test`, those
  that drew `train` are "withheld", a split that nobody writes.
  """
  placed = {}
  held_out = set()
  for record in kept:
    if record.at[0] == "test" or not record.has_answer:
      placed[record.at] = "test"
    else:
      placed[record.at] = splits.split_of(
        record.picture, salt=salt, eval_fraction=eval_fraction
      )
    if placed[record.at] != "train":
      held_out.add(record.group)
  for record in kept:
    if placed[record.at] == "train" and record.group in held_out:
      placed[record.at] = WITHHELD
  return placed


class Chosen:
  """The problems of one split, read from the source again on each pass."""

  def __init__(
    self,
    readers: folders.Readers,
    placed: Mapping[tuple[str, int], str],
    split: str,
  ):
    self._readers = readers
    self._indices: dict[str, set[int]] = {}
    for (source_split, index), side in placed.items():
      if side == split:
        self._indices.setdefault(source_split, set()).add(index)

  def __iter__(self) -> Iterator[records.Problem]:
    for source_split, indices in self._indices.items():
      for index, raw in enumerate(self._readers[source_split]()):
        if index in indices:
          yield _problem(raw)
