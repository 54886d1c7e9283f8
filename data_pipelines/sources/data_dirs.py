"""The data dirs that a run names: that they are whole, and may be used."""

import pathlib
from typing import Any, NamedTuple, NoReturn

from absl import logging

from data_pipelines.settings import DataConfig
from data_pipelines.sources import mixtures, stored
from data_pipelines.sources.origin import SYNTHETIC
from data_pipelines.storage import paths
from data_pipelines.text import untrusted
from data_pipelines.validation import (
  SettingError,
  is_machine_failure,
  printable,
  require,
)

_TEXTS, _OBJECTS = ("fingerprint", "terms"), ("counts", "tokenizer", "files")


class DataDir(NamedTuple):
  """A folder that `data_pipelines.prepare` made."""

  setting: str  # That names it.
  name: str  # In metrics, and before the pids of a mixture.
  folder: pathlib.Path  # On this machine's disk.
  share: int  # Its part of the prompts, beside those of the others.
  manifest: dict[str, Any]  # The contents of its manifest.json.
  bucket: str = ""  # The gs:// path of which the folder is a copy, if any.

  @property
  def place(self) -> str:
    """The folder as its user knows it."""
    return self.bucket or str(self.folder)

  def refuse_changed(self, change: str) -> NoReturn:
    """Raises a ValueError, because the data are not as they were made."""
    raise ValueError(
      f"{self.setting} ({self.place!r}) must be as "
      f"data_pipelines.prepare made it, but {printable(change)}; prepare the "
      "data again, in another folder."
    )


def open_all(settings: DataConfig) -> list[DataDir]:
  """The data dirs of the settings, whose files are those that they list."""
  folders = [folder for folder, _ in settings.weighted_dirs]
  shares = mixtures.whole_shares([x for _, x in settings.weighted_dirs])
  setting = "data.dirs" if settings.dirs else "data.dir"
  parts = zip(mixtures.names(folders), folders, shares, strict=True)
  opened = [open_dir(setting, *each) for each in parts]
  if len(opened) > 1:
    listed = (f"{100 * x.share / sum(shares):.4g} % {x.name}" for x in opened)
    logging.info("Prompts come from %s.", ", ".join(listed))
  return opened


def open_split(
  dirs: list[DataDir], split: str
) -> stored.Source | mixtures.Mixture:
  """The problems of a split in those data dirs that have it."""
  having = [each for each in dirs if split in each.manifest["counts"]]
  sources = {}
  for each in having:
    try:
      sources[each.name] = stored.source(each.folder, split)
    except ValueError as error:
      text = str(error).replace(str(each.folder), each.place)
      raise type(error)(text) from error
  return mixtures.Mixture(sources) if len(dirs) > 1 else sources[dirs[0].name]


def parts(dirs: list[DataDir], split: str) -> tuple[str, ...]:
  """A sentence for each source of which a split holds only a part."""
  found = []
  for each in dirs:
    source = f"{each.place}/{stored.MANIFEST}"
    origins = each.manifest.get("source_splits", {})
    for name in untrusted.check_kind(origins, dict, source):
      counts = untrusted.get_field(origins, name, dict, source)
      here, rest = counts.get(split, 0), counts.get("train", 0)
      untrusted.check_items((here, rest), int, source)
      if here and rest and "train" != split and name != SYNTHETIC:
        found.append(
          f"{each.name}: {split} is {here} of {here + rest} problems of "
          f"{printable(name) or 'the source'}; the rest is in train. To "
          "evaluate all, prepare with --eval_fraction=1."
        )
  return tuple(found)


def identity(dirs: list[DataDir]) -> dict[str, str]:
  """Fingerprints of the records; with several sets also their shares."""
  if len(dirs) == 1:
    return {"data.dir: its records": dirs[0].manifest["fingerprint"]}
  total = sum(each.share for each in dirs)
  return {
    f"data.dirs: records and share of set {number}": (
      f"{each.manifest['fingerprint']}, {each.share} of {total}"
    )
    for number, each in enumerate(dirs, start=1)
  }


def check(
  settings: DataConfig, dirs: list[DataDir], *, for_training: bool
) -> None:
  """Refuses data dirs that lack a split, or that the run may not use."""
  for each in dirs if for_training or settings.few_shot else ():
    require_split("data.train_split", settings.train_split, each)
  lacking = [x for x in dirs if settings.eval_split not in x.manifest["counts"]]
  if len(lacking) == len(dirs):
    require_split("data.eval_split", settings.eval_split, dirs[0])
  for each in lacking:
    message = "%s has no split %s: it is not evaluated."
    logging.warning(message, each.place, settings.eval_split)
  accepts = settings.accept_mathvista_training_terms
  terms = [each.place for each in dirs if each.manifest["terms"]]
  require(
    accepts or not (for_training and terms),
    "data.accept_mathvista_training_terms",
    accepts,
    f"be True to train on MathVista, which is in {', '.join(terms)}, and whose "
    "licence prohibits using it as a training set",
    "train on other data, or set it once you have read the licence",
  )


def require_split(setting: str, split: str, data_dir: DataDir) -> None:
  """Raises a ValueError unless the data dir has the split."""
  counts = data_dir.manifest["counts"]
  require(
    split in counts,
    setting,
    split,
    f"be one of the splits of the data dir {data_dir.place}, "
    f"{', '.join(counts)}",
    f"correct {setting}, or prepare the data again with such a split",
  )


def open_dir(setting: str, name: str, folder: str, share: int = 1) -> DataDir:
  """A data dir whose files have the sizes that it lists."""
  source = f"{folder}/{stored.MANIFEST}"
  try:
    here = stored.on_this_host(folder, what=setting)
    manifest = untrusted.read_json(here / stored.MANIFEST, source=source)
    for kind, fields in ((str, _TEXTS), (dict, _OBJECTS)):
      for field in fields:
        untrusted.get_field(manifest, field, kind, source)
    for field, kind in (("vocab_size", int), ("fingerprint", str)):
      untrusted.get_field(manifest["tokenizer"], field, kind, source)
    untrusted.check_items(manifest["files"].values(), int, source)
  except (OSError, ValueError) as error:
    if isinstance(error, SettingError) or is_machine_failure(error):
      raise
    raise ValueError(
      f"{setting} ({folder!r}) must be a folder that data_pipelines.prepare "
      f"has made: {error}; run python -m data_pipelines.prepare "
      f"--data_dir={folder} first."
    ) from error
  bucket = folder if paths.is_remote(folder) else ""
  opened = DataDir(setting, name, here, share, manifest, bucket)
  for file, size in manifest["files"].items():
    path = opened.folder / file
    found = path.stat().st_size if path.is_file() else "no"
    if found != size:
      opened.refuse_changed(f"{file} had {size} bytes and has {found}")
  return opened
