"""Checks the records of a source, and keeps the usable ones on disk.

The source is read once, record by record. Of a usable record a short summary
stays in memory, enough to decide its split.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import time
import unicodedata
from collections.abc import Generator, Mapping, Sequence

from absl import logging

from data_pipelines import images, records
from data_pipelines.sources import files, near_duplicates, processes, stored
from data_pipelines.sources.drawn import synthetic
from data_pipelines.sources.rows import columns, mathvista
from data_pipelines.text import untrusted
from data_pipelines.validation import printable
from data_pipelines.verifier import verify

# So few records are checked sooner than processes start.
_FEW = 200
_BATCH = 8
_LOG_EVERY = 10.0  # Seconds.
# Bytes that an error message quotes, perhaps of an image.
_QUOTED_BYTES = re.compile(r"""\bb(['"]).*?\\{1,2}x.*""", re.DOTALL)


# Of images, by the hash of their pixels: the index in the problem, and the
# perceptual hash.
type Hashes = dict[str, tuple[int, near_duplicates.ImageHash]]


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
  """A record as its reader gives it, and where it stands in the source."""

  split: str  # The source's.
  index: int
  number: int  # The index among the records of all splits.
  raw: files.RawRecord


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
  """The summary of a usable record."""

  split: str  # The source's.
  index: int  # In that split.
  pid: str
  # A hash of the pixels of each image; of a text problem one of its question.
  # Records that share a hash must not be divided.
  groups: tuple[str, ...]
  is_hidden: bool  # True if there is an answer, but it is not public.
  is_mathvista: bool  # True if MathVista's terms cover it.
  digest: str  # A hash of the whole record.
  place: int = -1  # The index in the scratch file.


# A usable record, as a process sends it: its summary and its encoded problem.
type _Checked = tuple[Record, bytes, Hashes]


@dataclasses.dataclass(frozen=True, slots=True)
class Reject:
  """A record that cannot be used, and why."""

  split: str
  index: int
  pid: str | None
  reason: str
  detail: str


@dataclasses.dataclass(frozen=True)
class Checker:
  """Checks records, in whatever process."""

  # The columns of each of the source's splits that holds rows.
  chosen: Mapping[str, columns.Columns]
  settings: columns.Settings = columns.Settings()
  with_looks: bool = False  # True to hash perceptually too.

  def __call__(self, items: Sequence[Item]) -> list[_Checked | Reject]:
    """A result for each record; no record's fault is an exception."""
    results = []
    for item in items:
      try:
        with records.all_faults():
          checked = self._summarize(item, self._judge(self.problem(item)))
      except records.BadRecord as error:
        checked = self.reject(item, error)
      results.append(checked)
    return results

  def reject(self, item: Item, why: records.BadRecord) -> Reject:
    """The entry of a record in the list of rejects; holds no image."""
    raw, pid = item.raw, None
    if isinstance(raw, files.Row):
      pid = columns.pid(raw.values, self.chosen[item.split], item.number)
    elif isinstance(raw, records.Problem):
      pid = raw.pid
    pid = None if pid is None else printable(pid[:60])
    detail = _QUOTED_BYTES.sub("(bytes)", why.detail)
    return Reject(item.split, item.index, pid, why.reason, detail)

  def problem(self, item: Item) -> records.Problem:
    """The problem of a record; raises whatever a row without one may raise."""
    if isinstance(item.raw, records.BadRecord):
      raise item.raw
    if isinstance(item.raw, records.Problem):
      problem = item.raw
    else:
      known = self.chosen[item.split]
      problem = columns.to_problem(item.raw, known, item.number, self.settings)
    records.validate(problem)
    if _has_no_answer(problem) and item.split.partition("/")[0] != "test":
      raise records.BadRecord(
        "missing_answer",
        "the answer is empty; name its column with --columns=answer=NAME, or "
        "add --unchecked_answers=keep for rewards that need none",
      )
    return problem

  def _judge(self, problem: records.Problem) -> records.Problem:
    """The problem, if the verifier takes its answer for right.

    One at a time, so that each process has one worker for expressions.
    """
    if not problem.is_checkable:
      return problem
    verdict = verify.verify(f"<answer>{problem.answer}</answer>", problem)
    if verdict.correct:
      return problem
    if self.settings.unchecked_answers == "keep" and not problem.choices:
      return dataclasses.replace(problem, answer_type="unchecked")
    does = "cannot check" if verdict.abstained else "rejects"
    raise records.BadRecord(
      "answer_fails_verifier",
      f"the verifier {does} {untrusted.shorten(problem.answer)} as an answer "
      f"of type {problem.answer_type}; correct it, or add "
      "--unchecked_answers=keep",
    )

  def _summarize(self, item: Item, problem: records.Problem) -> _Checked:
    """The summary of a problem, which raises if an image cannot be shown."""
    groups, looks = hash_groups(problem, self.with_looks)
    record = Record(
      split=item.split,
      index=item.index,
      pid=problem.pid,
      groups=groups,
      is_hidden=_has_no_answer(problem),
      is_mathvista=mathvista.is_original(problem.metadata),
      digest=_digest(problem),
    )
    return record, stored.encode(problem), looks


def _has_no_answer(problem: records.Problem) -> bool:
  """True for a problem that neither rules nor labels can judge by mistake."""
  is_unchecked = problem.answer_type == "unchecked" or problem.completions
  return not problem.answer and not is_unchecked


def hash_groups(
  problem: records.Problem, with_looks: bool
) -> tuple[tuple[str, ...], Hashes]:
  """The groups of a problem, and the perceptual hashes of its images."""
  if not problem.images:
    lines = [_normalize(text) for text in problem.choices]
    text = "\n".join([_normalize(problem.question), *sorted(lines)])
    return (f"text-{hashlib.sha256(text.encode()).hexdigest()}",), {}
  groups: list[str] = []
  looks: Hashes = {}
  # Drawn images look alike and still have different answers.
  source = str(problem.metadata.get("source", ""))
  with_looks = with_looks and not source.startswith(synthetic.SOURCE)
  for index, encoded in enumerate(problem.images):
    image = images.decode(encoded)
    groups.append(images.pixel_hash(image))
    if with_looks:
      looks[groups[-1]] = (index, near_duplicates.hash_image(image))
  return tuple(groups), looks


def _normalize(text: str) -> str:
  """The text without what does not change its meaning: case, blanks, forms."""
  return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _digest(problem: records.Problem) -> str:
  example = records.to_example(problem)
  digest = hashlib.sha256(b"".join(example.pop("images")))
  digest.update(json.dumps(example, sort_keys=True).encode())
  return digest.hexdigest()


def check_records(
  readers: files.Readers,
  checker: Checker,
  scratch: stored.Scratch,
  looks: near_duplicates.Looks,
  *,
  num_workers: int = 0,
  total: int | None = None,
) -> tuple[list[Record], list[Reject]]:
  """The usable records and the rejected ones, in the order of the source.

  `scratch` gets the usable problems, `looks` their perceptual hashes. `total`
  is the number of records, if it is known, for the log.
  """
  rejects: list[Reject] = []
  taken: dict[str, Record] = {}
  start = time.monotonic()
  with contextlib.closing(_check(readers, checker, num_workers)) as results:
    for count, checked in enumerate(results, 1):
      if count > _FEW:
        speed = count / (time.monotonic() - start)
        rest = " records"
        if total is not None:
          rest = f" of {total}, {(total - count) / speed:.0f} s left"
        logging.log_every_n_seconds(
          logging.INFO,
          "Checked %d%s; %.0f/s.",
          _LOG_EVERY,
          *(count, rest, speed),
        )
      if isinstance(checked, Reject):
        rejects.append(checked)
        continue
      record, example, hashes = checked
      other = taken.get(record.pid)
      # Names often start again in each split of a source.
      if other and other.split != record.split:
        pid = f"{record.split}:{record.pid}"
        problem = dataclasses.replace(stored.decode(example), pid=pid)
        example, digest = stored.encode(problem), _digest(problem)
        record = dataclasses.replace(record, pid=pid, digest=digest)
        other = taken.get(pid)
      if other:
        pid = printable(record.pid[:60])
        detail = (
          f"record {other.index} of {other.split or 'the source'} has its pid; "
          "name a column of unique values with --columns=pid=NAME, or none "
          "with --columns=pid="
        )
        reason = "duplicate_pid"
        rejects.append(Reject(record.split, record.index, pid, reason, detail))
        continue
      record = dataclasses.replace(record, place=scratch.append(example))
      taken[record.pid] = record
      looks.add(hashes, record.place)
  return list(taken.values()), rejects


def _check(
  readers: files.Readers, checker: Checker, num_workers: int
) -> Generator[_Checked | Reject, None, None]:
  """The result for each record, in order."""

  def lost(item: Item, how: str) -> Reject:
    detail = f"the process that read it {how}; look for a damaged image"
    return checker.reject(item, records.BadRecord("lost_process", detail))

  numbers = itertools.count()
  items = (
    Item(split, index, next(numbers), raw)
    for split, read in readers.items()
    for index, raw in enumerate(read())
  )
  few = itertools.islice(items, _FEW)
  for each, count in ((few, 0), (items, num_workers)):
    batches = itertools.batched(each, _BATCH)
    yield from processes.map_in_order(
      checker, batches, num_workers=count, lost=lost
    )


def hash_all(
  problems: Sequence[records.Problem | records.BadRecord], *, with_looks: bool
) -> list[tuple[tuple[str, ...], Hashes] | str]:
  """The `hash_groups` of problems; of one that cannot be read, the reason."""
  results = []
  for each in problems:
    if isinstance(each, records.BadRecord):
      results.append(str(each))
      continue
    try:
      results.append(hash_groups(each, with_looks))
    except records.BadRecord as error:
      results.append(f"{each.pid}, {error}")
  return results
