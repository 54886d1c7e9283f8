"""Builds a data dir: problems by split, a tokenizer, rejects and a manifest.

    python -m data_pipelines.prepare --source=synthetic --data_dir=DIR

A complete data dir is reused as it is. One that was made from another source
or with other flags is kept, unless --overwrite is given. See
docs/data.md for the details.
"""

import dataclasses
import re
import signal
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from data_pipelines import validation
from data_pipelines.sources import build, processes, splits
from data_pipelines.sources.drawn import reasoning_gym, synthetic
from data_pipelines.text import flags as command_flags

FLAGS = flags.FLAGS

_KINDS = (
  *("color", "shape", "count", "bar_value", "bar_max", "table_value"),
  *("clock_time", "dot_total"),
)
# The default of each flag, and its help.
_FLAGS = {
  "source": (
    build.SYNTHETIC,
    "'synthetic' to draw problems, or a folder or file of problems, also on "
    "gs://, or one for each split: train=PATH,eval=PATH,test=PATH. See "
    "docs/data.md for the formats.",
  ),
  "columns": (
    [],
    "The source's columns that are not to be guessed, as question=problem,"
    "answer=reward_model.ground_truth; pid= for no such column.",
  ),
  "data_dir": ("", "The folder to build."),
  "overwrite": (False, "Replace a data dir of another source or other flags."),
  "seed": (0, "Random seed."),
  "eval_fraction": (0.1, "Expected share of answered images for eval."),
  "vocab_size": (1024, "Most pieces of the tokenizer."),
  "max_reject_fraction": (0.01, "Fail above this share of unusable records."),
  "split": (
    [],
    "The splits to divide into train and eval, or train=NAME,eval=NAME to keep "
    "them. By default the names of the splits decide.",
  ),
  "exclude": ([], "Data dirs; what also stands in one of them never trains."),
  # Of sources that are drawn, with what a run without a data dir draws: a test
  # compares them with the defaults of the settings.
  "num_problems": (10_000, "Number of problems to draw."),
  "difficulty": (2, "Difficulty of synthetic problems, 1-5."),
  "kinds": (list(_KINDS), "Kinds of synthetic problems, each equally often."),
  "image_size": (96, "Side of synthetic images, in pixels."),
  "multi_choice_share": (0.25, "Share of number questions with options."),
  "min_options": (2, "Fewest options of a synthetic question."),
  "max_options": (8, "Most options of a synthetic question."),
}
_DEFINE = {
  str: flags.DEFINE_string,
  list: flags.DEFINE_list,
  bool: flags.DEFINE_bool,
  int: flags.DEFINE_integer,
  float: flags.DEFINE_float,
}


def _define_flags() -> None:
  """Defines the flags, for the command alone and not for importers."""
  for name, (default, text) in _FLAGS.items():
    _DEFINE[type(default)](name, default, text)
  flags.DEFINE_enum(
    "unchecked_answers",
    "reject",
    ["reject", "keep"],
    "Records without an answer, or with one that no rule can check: reject "
    "them, or keep them for rewards that need no rule.",
  )
  flags.DEFINE_float(
    "tolerance",
    None,
    "Largest relative error of a right number; 0.05 for ChartQA.",
  )
  flags.DEFINE_enum(
    "near_duplicates",
    "exact",
    ["exact", "perceptual", "none"],
    "What train loses to eval: images with equal pixels, also those that look "
    "alike, or nothing.",
  )


def _from_flags(cls: type, **given: Any) -> Any:
  """An object whose other fields are the flags with their names."""
  for field in dataclasses.fields(cls):
    if field.name not in given and field.name in FLAGS:
      value = getattr(FLAGS, field.name)
      given[field.name] = tuple(value) if isinstance(value, list) else value
  return cls(**given)


def _request() -> build.Request:
  source = FLAGS.source
  if source == build.SYNTHETIC:
    with validation.user_errors():
      source = _from_flags(synthetic.Spec)
  elif source.startswith(reasoning_gym.PREFIX):
    with validation.user_errors():
      tasks = reasoning_gym.parse_tasks(source)
      source = _from_flags(reasoning_gym.Spec, tasks=tasks, version="")
  elif re.match(f"({'|'.join(splits.OURS)})=", source):
    source = _pairs("source", source.split(","), splits.OURS)
  columns = _pairs("columns", FLAGS.columns)
  return _from_flags(build.Request, source=source, columns=columns)


def _pairs(
  flag: str, items: Sequence[str], known: Sequence[str] = ()
) -> dict[str, str]:
  """The names on the left of "=", each with what stands on the right.

  Raises:
    SettingError: An item has no "=", or a name is unknown or there twice.
  """
  pairs: dict[str, str] = {}
  for item in items:
    name, sign, value = item.strip().partition("=")
    if not sign or name in pairs or (known and name not in known):
      names = ", ".join(known) or "ours=theirs"
      raise validation.SettingError(
        f"{flag} ({','.join(items)!r}) must be pairs of {names}, each name "
        f"once, but holds {item!r}; see --help."
      )
    pairs[name] = value
  return pairs


def main(arguments: Sequence[str]) -> None:
  """Builds the data dir that the flags describe."""
  with validation.user_errors():
    validation.require(
      not arguments, "arguments", arguments, "be flags", "see --help"
    )
  cores = processes.count_cores()
  try:
    # Ctrl-C must not leave an unfinished folder behind.
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    build.build_data_dir(
      _request(),
      overwrite=FLAGS.overwrite,
      num_workers=cores if cores > 1 else 0,
    )
  except KeyboardInterrupt:
    logging.error("Stopped by Ctrl-C; nothing was written.")
    sys.exit(validation.ExitCode.INTERRUPTED)


if __name__ == "__main__":
  _define_flags()
  logging.set_verbosity(logging.INFO)
  command_flags.run(main)
