"""Checks the records of a source and assigns each usable one to a split.

A source is read more than once instead of being held in memory: a first pass
keeps a short summary of each record, and later passes select by the summaries.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipelines import images, records
from data_pipelines.sources import (
  files,
  mathvista,
  near_duplicates,
  stored,
  synthetic,
)
from data_pipelines.text import untrusted
from data_pipelines.validation import printable
from data_pipelines.verifier import verify

# The split of training records whose image has a near-duplicate in `eval` or
# `test`. It is never written.
WITHHELD = "withheld"


@dataclasses.dataclass(frozen=True)
class AcceptedRecord:
  """The summary of a usable record, enough to assign it to a split."""

  key: tuple[str, int]  # The source's split, and the index in it.
  pid: str
  image: str  # The hash of its pixels.
  group: str  # The smallest hash among its image's near-duplicates.
  is_checkable: bool
  is_mathvista: bool
  digest: str


def check_records(
  readers: files.Readers,
) -> tuple[list[AcceptedRecord], list[dict[str, Any]]]:
  """The usable records, and the rejected ones with their reasons."""
  accepted: list[AcceptedRecord] = []
  rejects: list[dict[str, Any]] = []
  hashes: dict[str, near_duplicates.ImageHash | None] = {}
  pids: set[str] = set()
  for split, reader in readers.items():
    for index, raw in enumerate(reader()):
      try:
        with records.all_faults():
          record, image_hash = _summarize((split, index), raw)
        if record.pid in pids:
          raise records.BadRecord("duplicate_pid", "another record has its pid")
      except records.BadRecord as error:
        why = {"reason": error.reason, "detail": error.detail}
        rejects.append(
          {"split": split, "index": index, "pid": _pid(raw), **why}
        )
        continue
      pids.add(record.pid)
      if image_hash is not None or record.image not in hashes:
        hashes[record.image] = image_hash
      accepted.append(record)
  groups = near_duplicates.groups(hashes)
  return [
    dataclasses.replace(record, group=groups[record.image])
    for record in accepted
  ], rejects


def _problem(raw: files.RawRecord) -> records.Problem:
  """The problem of a record, which may raise anything."""
  if isinstance(raw, records.BadRecord):
    raise raw
  if isinstance(raw, records.Problem):
    return raw
  raise AssertionError("its row was never read")


def _pid(raw: files.RawRecord) -> str | None:
  """The pid for a message; of any type in the source."""
  if isinstance(raw, files.Row):
    pid = raw.values.get("pid")
  else:
    pid = raw.pid if isinstance(raw, records.Problem) else None
  if isinstance(pid, str):
    return printable(pid[:60])
  return None if pid is None else untrusted.shorten(pid)


def _summarize(
  key: tuple[str, int], raw: files.RawRecord
) -> tuple[AcceptedRecord, near_duplicates.ImageHash | None]:
  """The summary of a record, and the hash of how its image looks."""
  problem = _problem(raw)
  image, image_hash = _hash_image(problem)
  record = AcceptedRecord(
    key=key,
    pid=problem.pid,
    image=image,
    group=image,
    is_checkable=problem.is_checkable,
    is_mathvista=mathvista.is_original(problem.metadata),
    digest=_digest(problem),
  )
  return record, image_hash


def _hash_image(
  problem: records.Problem,
) -> tuple[str, near_duplicates.ImageHash | None]:
  """Checks a problem, and hashes its image exactly and perceptually.

  Synthetic images look alike and still have different answers, so only equal
  pixels make them duplicates: they have no perceptual hash.

  Raises:
    BadRecord: The problem cannot be asked, shown or scored.
  """
  records.validate(problem)
  stored.check_storable(problem)
  pictures = [images.decode(image) for image in problem.images]
  if problem.is_checkable:
    answer = problem.answer
    if not verify.verify(f"<answer>{answer}</answer>", problem).correct:
      raise records.BadRecord(
        "answer_fails_verifier",
        f"the verifier rejects {untrusted.shorten(answer)} as an answer",
      )
  if len(pictures) != 1:
    shown = "".join(map(images.pixel_hash, pictures)) or problem.question
    return hashlib.sha256(shown.encode()).hexdigest(), None
  (image,) = pictures
  perceptual = None
  if not synthetic.is_synthetic(problem):
    perceptual = near_duplicates.hash_image(image)
  return images.pixel_hash(image), perceptual


def _digest(problem: records.Problem) -> str:
  example = records.to_example(problem)
  digest = hashlib.sha256(b"".join(example.pop("images")))
  digest.update(json.dumps(example, sort_keys=True).encode())
  return digest.hexdigest()


def fingerprint(
  accepted: Sequence[AcceptedRecord], splits: Mapping[tuple[str, int], str]
) -> str:
  """One hash of all records and their splits, in any order."""
  lines = sorted(f"{splits[each.key]} {each.digest}\n" for each in accepted)
  return hashlib.sha256("".join(lines).encode()).hexdigest()


def split_of(image: str, *, salt: str, eval_fraction: float) -> str:
  """The split of every problem that shows one image: "train" or "eval".

  A pure function of the image's hash and the salt, so adding or removing
  records never moves another record. Another salt is an independent division.
  """
  digest = hashlib.sha256(f"{salt}|{image}".encode()).digest()
  position = int.from_bytes(digest[:8]) / 2**64
  return "eval" if position < eval_fraction else "train"


def assign_splits(
  accepted: Sequence[AcceptedRecord], *, salt: str, eval_fraction: float
) -> dict[tuple[str, int], str]:
  """The split of every record; no image of `train` has a duplicate elsewhere.

  A record's split depends on its own image alone, so that no other record can
  move it. Where a group of near-duplicates gets both `train` and another split,
  its `train` records are withheld.
  """
  assigned = {}
  held_out = set()
  for record in accepted:
    if record.key[0] == "test" or not record.is_checkable:
      assigned[record.key] = "test"
    else:
      assigned[record.key] = split_of(
        record.image, salt=salt, eval_fraction=eval_fraction
      )
    if assigned[record.key] != "train":
      held_out.add(record.group)
  for record in accepted:
    if assigned[record.key] == "train" and record.group in held_out:
      assigned[record.key] = WITHHELD
  return assigned


def read_split(
  readers: files.Readers, assigned: Mapping[tuple[str, int], str], split: str
) -> Iterator[records.Problem]:
  """Reads the problems of one split from the source again."""
  keys = dict.fromkeys(key for key, side in assigned.items() if side == split)
  for source_split in dict.fromkeys(name for name, _ in keys):
    for index, raw in enumerate(readers[source_split]()):
      if (source_split, index) in keys:
        yield _problem(raw)
