"""Makes a data dir out of MathVista, of its like, or of drawn problems.

    python -m data_pipelines.prepare --source=synthetic --data_dir=DIR

A data dir holds the problems as ArrayRecord (splits `train`, `eval` and, where
the source has unanswered ones, `test`), `tokenizer.model` trained on them,
`rejects.jsonl`, and `manifest.json`. It appears whole or not at all, and is
used as it stands when asked for again.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags, logging

from data_pipelines import flags as command_line
from data_pipelines import records
from data_pipelines.sources import folders, intake, mathvista, synthetic
from data_pipelines.text import chat_prompts, tokenizer

# Raise it when the same request would give other bytes.
FORMAT = 2
_SYNTHETIC = "synthetic"
_MANIFEST, _REJECTS = "manifest.json", "rejects.jsonl"
_TOKENIZER = "tokenizer.model"
_OURS = {_MANIFEST, _REJECTS, _TOKENIZER, mathvista.MathVista.name}
_MAX_TOKENIZER_TEXTS = 3_000


class RequestError(ValueError):
  """What was asked for cannot be made; the message names what to change."""


@dataclasses.dataclass(frozen=True)
class Request:
  """What to make, and where.

  Attributes:
    source: Problems to draw, or a folder as `sources` knows them.
    data_dir: The folder to make.
    seed: Another seed is another division into train and eval.
    eval_fraction: Expected share of the answered pictures that `eval` gets;
      0 makes no `eval`, 1 no `train`.
    vocab_size: Of the tokenizer, at most.
    max_reject_fraction: Above this share of unusable records none is kept.
  """

  source: synthetic.Spec | str
  data_dir: str
  seed: int
  eval_fraction: float
  vocab_size: int
  max_reject_fraction: float

  def __post_init__(self):
    for name, holds, rule in (
      ("data_dir", self.data_dir != "", "the path of a folder"),
      ("seed", self.seed >= 0, "at least 0"),
      ("eval_fraction", 0 <= self.eval_fraction <= 1, "0 to 1"),
      ("max_reject_fraction", 0 <= self.max_reject_fraction < 1, "0 up to 1"),
    ):
      if not holds:
        raise RequestError(f"{name} ({getattr(self, name)!r}) must be {rule}.")


def prepare(request: Request) -> dict[str, Any]:
  """Makes the data dir, unless it is there already.

  Two processes may ask for the same one: the second waits and reuses it.

  Returns:
    The manifest: `source`, `terms` (whose terms forbid training on it, or ""),
    `counts` by split, `rejects` by reason, `withheld` pids that are in no
    split (see `intake.placed`), `fingerprint` of all records whatever their
    order, `salt` of the division, `tokenizer`, `files`.

  Raises:
    RequestError: The request, the source or the folder must change first.
  """
  readers, wanted = _opened(request)
  data_dir = pathlib.Path(request.data_dir).resolve()
  building = data_dir.with_name(f".{data_dir.name}.building")
  retired = data_dir.with_name(f".{data_dir.name}.retired")
  _hold_replaceable(data_dir)
  with _locked(data_dir):
    manifest = _reusable(data_dir, wanted)
    if manifest is not None:
      logging.info("Reusing %s: %s.", data_dir, manifest["counts"])
      return manifest
    # Left behind by a process that was killed.
    for leftover in (building, retired):
      shutil.rmtree(leftover, ignore_errors=True)
    building.mkdir()
    try:
      manifest = _build(request, readers, wanted, building)
      if data_dir.exists():
        data_dir.rename(retired)
      building.rename(data_dir)
    finally:
      for leftover in (building, retired):
        shutil.rmtree(leftover, ignore_errors=True)
  logging.info("Prepared %s: %s.", data_dir, manifest["counts"])
  return manifest


def _opened(request: Request) -> tuple[folders.Readers, dict[str, Any]]:
  """What reads the source, and what a data dir of the request must match."""
  wanted = dataclasses.asdict(request)
  del wanted["data_dir"]
  if isinstance(request.source, synthetic.Spec):
    spec = request.source
    drawn = functools.cache(lambda: list(synthetic.problems(spec)))
    readers: folders.Readers = {_SYNTHETIC: drawn}
  else:
    try:
      folder = folders.find(request.source)
    except mathvista.SnapshotError as error:
      raise RequestError(str(error)) from error
    # Not where they lie: a snapshot may be moved.
    readers, wanted["source"] = folder.readers, folder.files
  # As JSON gives it back: with lists for tuples.
  return readers, json.loads(json.dumps({"format": FORMAT, **wanted}))


def _hold_replaceable(data_dir: pathlib.Path) -> None:
  """Refuses a folder that holds what is not ours to replace."""
  if not data_dir.exists():
    return
  if not data_dir.is_dir():
    raise RequestError(
      f"data_dir ({str(data_dir)!r}) must be a folder, not a file."
    )
  foreign = sorted({path.name for path in data_dir.iterdir()} - _OURS)
  if foreign:
    raise RequestError(
      f"data_dir ({str(data_dir)!r}) must be new, empty or made by prepare, "
      f"but holds {', '.join(foreign[:3])}; name another."
    )


@contextlib.contextmanager
def _locked(data_dir: pathlib.Path) -> Iterator[None]:
  """Waits until no other process is making this data dir."""
  try:
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = open(data_dir.with_name(f".{data_dir.name}.lock"), "w")
  except OSError as error:
    raise RequestError(
      f"data_dir ({str(data_dir)!r}) must be a folder that can be made: "
      f"{error}; name another."
    ) from error
  with lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def _reusable(
  data_dir: pathlib.Path, wanted: Mapping[str, Any]
) -> dict[str, Any] | None:
  """The manifest of a whole data dir that was made from the same request."""
  if not (data_dir / _MANIFEST).exists():
    return None
  try:
    manifest = json.loads((data_dir / _MANIFEST).read_text())
    if manifest["request"] == wanted and manifest["files"] == _sizes(data_dir):
      return manifest
  except (OSError, ValueError, KeyError, TypeError) as error:
    logging.warning("Cannot read the manifest of %s: %r", data_dir, error)
  logging.info("Making %s anew: damaged, or of another request.", data_dir)
  return None


def _sizes(folder: pathlib.Path) -> dict[str, int]:
  """Bytes of every file under the folder but the manifest."""
  return {
    path.relative_to(folder).as_posix(): path.stat().st_size
    for path in sorted(folder.rglob("*"))
    if path.is_file() and path.name != _MANIFEST
  }


def _build(
  request: Request,
  readers: folders.Readers,
  wanted: dict[str, Any],
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Writes a data dir into an empty folder."""
  try:
    kept, rejects = intake.sift(readers)
  except mathvista.SnapshotError as error:
    raise RequestError(str(error)) from error
  _hold_rejects(request, len(kept), rejects)
  salt = f"seed-{request.seed}"
  placed = intake.placed(kept, salt=salt, eval_fraction=request.eval_fraction)
  counts = collections.Counter(placed.values())
  if 0 < request.eval_fraction < 1 and not _both_sided(counts):
    raise RequestError(
      f"eval_fraction ({request.eval_fraction}) must leave pictures to both "
      f"sides, but train gets {counts['train']} problems and eval "
      f"{counts['eval']}; move it towards 0.5 or give more problems."
    )
  problems = {
    split: intake.Chosen(readers, placed, split)
    for split in ("train", "eval", "test")
    if counts[split]
  }
  _train_tokenizer(
    next(iter(problems.values())), folder / _TOKENIZER, request.vocab_size
  )
  mathvista.write(problems, folder)
  with open(folder / _REJECTS, "w") as file:
    file.writelines(
      json.dumps(reject, default=str) + "\n" for reject in rejects
    )
  drawn = isinstance(request.source, synthetic.Spec)
  trained = tokenizer.Tokenizer(folder / _TOKENIZER)
  reasons = collections.Counter(reject["reason"] for reject in rejects)
  manifest = {
    "source": _SYNTHETIC if drawn else request.source,
    "terms": mathvista.terms(sum(k.is_mathvista for k in kept), len(kept)),
    "counts": {split: counts[split] for split in problems},
    "rejects": dict(sorted(reasons.items())),
    "withheld": sorted(k.pid for k in kept if placed[k.at] == intake.WITHHELD),
    "fingerprint": intake.fingerprint(kept, placed),
    "salt": salt,
    "tokenizer": {
      "fingerprint": trained.fingerprint,
      "vocab_size": trained.vocab_size,
    },
    "files": _sizes(folder),
    "request": wanted,
  }
  (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
  return manifest


def _both_sided(counts: Mapping[str, int]) -> bool:
  """Whether train and eval both got problems, or there were none to divide."""
  return (counts["train"] > 0) == (counts["eval"] > 0)


def _hold_rejects(
  request: Request, num_kept: int, rejects: Sequence[Mapping[str, Any]]
) -> None:
  total = num_kept + len(rejects)
  if not total:
    raise RequestError(f"source ({request.source!r}) must hold some record.")
  # Below 1, so that some record is kept.
  if len(rejects) / total <= request.max_reject_fraction:
    return
  reasons = collections.Counter(reject["reason"] for reject in rejects)
  counted = ", ".join(f"{n} {why}" for why, n in sorted(reasons.items()))
  first = rejects[0]
  raise RequestError(
    f"max_reject_fraction ({request.max_reject_fraction}) must not be passed, "
    f"but {len(rejects)} of {total} records cannot be used ({counted}; the "
    f"first: pid {first['pid']} of {first['split']}, {first['detail']}); mend "
    "the source or raise it."
  )


def _train_tokenizer(
  problems: Iterable[records.Problem], path: pathlib.Path, vocab_size: int
) -> None:
  texts = (chat_prompts.chat_text(problem) for problem in problems)
  try:
    tokenizer.train(
      itertools.islice(texts, _MAX_TOKENIZER_TEXTS), path, vocab_size
    )
  except ValueError as error:
    raise RequestError(str(error)) from error


FLAGS = flags.FLAGS


def _define_flags() -> None:
  """The flags of the command; for its importers there are none."""
  flags.DEFINE_string(
    "source",
    _SYNTHETIC,
    "'synthetic' for drawn problems, or a folder: a MathVista snapshot "
    "(testmini-*.parquet, also on gs://), the GitHub layout (testmini.json and "
    "images/), or what prepare has made.",
  )
  flags.DEFINE_string("data_dir", "", "The folder to make.")
  flags.DEFINE_integer("seed", 0, "Of the drawing and of the division.")
  flags.DEFINE_float(
    "eval_fraction", 0.2, "Expected share of answered pictures for eval."
  )
  flags.DEFINE_integer("vocab_size", 1024, "Of the tokenizer, at most.")
  flags.DEFINE_float(
    "max_reject_fraction", 0.01, "Fail above this share of bad records."
  )
  flags.DEFINE_integer("num_problems", 10_000, "How many to draw.")
  flags.DEFINE_integer("difficulty", 1, "Of drawn problems, 1 to 5.")
  flags.DEFINE_list(
    "kinds", list(synthetic.KINDS), "Of drawn problems, each equally often."
  )
  flags.DEFINE_integer("image_size", 96, "Side of drawn pictures, in pixels.")
  flags.DEFINE_float(
    "multi_choice_share", 0.2, "Share of drawn number questions with options."
  )
  flags.DEFINE_integer("min_options", 2, "Fewest options of a drawn question.")
  flags.DEFINE_integer("max_options", 8, "Most options of a drawn question.")


def _request() -> Request:
  source: synthetic.Spec | str = FLAGS.source
  if source == _SYNTHETIC:
    try:
      source = synthetic.Spec(
        num_problems=FLAGS.num_problems,
        seed=FLAGS.seed,
        difficulty=FLAGS.difficulty,
        kinds=tuple(FLAGS.kinds),
        image_size=FLAGS.image_size,
        multi_choice_share=FLAGS.multi_choice_share,
        min_options=FLAGS.min_options,
        max_options=FLAGS.max_options,
      )
    except ValueError as error:
      raise RequestError(str(error)) from error
  return Request(
    source=source,
    data_dir=FLAGS.data_dir,
    seed=FLAGS.seed,
    eval_fraction=FLAGS.eval_fraction,
    vocab_size=FLAGS.vocab_size,
    max_reject_fraction=FLAGS.max_reject_fraction,
  )


def main(argv: Sequence[str]) -> None:
  """Makes what the flags ask for; exits 64 where they cannot be followed."""
  try:
    if len(argv) > 1:
      raise RequestError(f"arguments ({argv[1:]}) must be flags; see --help.")
    prepare(_request())
  except RequestError as error:
    command_line.refuse(error)


if __name__ == "__main__":
  _define_flags()
  logging.set_verbosity(logging.INFO)
  app.run(main, flags_parser=command_line.parse)
