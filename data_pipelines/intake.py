"""Which records of a source can be used, and which split each falls on.

A source is read more than once rather than held in memory: a first pass
remembers a few words of each record, later ones pick by them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_pipelines import images, records, splits, verifier

# A problem that has been drawn, or a row of a parquet file.
Raw = records.Problem | Mapping[str, Any]
# By the source's own splits, what reads their records from the start.
Readers = Mapping[str, Callable[[], Iterable[Raw]]]


@dataclasses.dataclass(frozen=True)
class Kept:
  """What must be remembered of a usable record to place it."""

  at: tuple[str, int]  # The source's split, and the place in it.
  group: str
  has_answer: bool
  source: str
  digest: str


def sift(readers: Readers) -> tuple[list[Kept], list[dict[str, Any]]]:
  """The usable records, and why the others are not."""
  kept: list[Kept] = []
  rejects: list[dict[str, Any]] = []
  pids: set[str] = set()
  for split, reader in readers.items():
    for index, raw in enumerate(reader()):
      pid = raw.pid if isinstance(raw, records.Problem) else raw.get("pid")
      try:
        problem = _problem(raw)
        group = _group(problem)
        if problem.pid in pids:
          raise records.BadRecord("duplicate_pid", "another record has its pid")
      except records.BadRecord as error:
        why = {"reason": error.reason, "detail": error.detail}
        rejects.append({"split": split, "index": index, "pid": pid, **why})
        continue
      pids.add(problem.pid)
      source = str(problem.metadata.get("source", ""))
      at, digest = (split, index), _digest(problem)
      kept.append(Kept(at, group, problem.has_answer, source, digest))
  return kept, rejects


def _problem(raw: Raw) -> records.Problem:
  return raw if isinstance(raw, records.Problem) else records.from_row(raw)


def _group(problem: records.Problem) -> str:
  """The hash of a usable problem's picture; problems may share one.

  Raises:
    BadRecord: The problem cannot be asked, shown or scored.
  """
  records.validate(problem)
  group = images.pixel_hash(images.decode(problem.image_bytes))
  if problem.has_answer:
    answer = verifier.final_answer(problem)
    if not verifier.verify(f"<answer>{answer}</answer>", problem).correct:
      raise records.BadRecord(
        "answer_fails_verifier", f"{answer!r} is not found right"
      )
  return group


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
  """The split of every record; no picture is in `train` and another split."""
  unanswered = {
    record.at
    for record in kept
    if record.at[0] == "test" or not record.has_answer
  }
  shown = {record.group for record in kept if record.at in unanswered}
  placed = {}
  for record in kept:
    if record.at in unanswered:
      placed[record.at] = "test"
    elif record.group in shown:
      placed[record.at] = "eval"
    else:
      placed[record.at] = splits.split_of(
        record.group, salt=salt, eval_fraction=eval_fraction
      )
  return placed


class Chosen:
  """The problems of one split, read from the source again on each pass."""

  def __init__(
    self,
    readers: Readers,
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
