"""Guesses the column of each role from names in use and the values beneath."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.sources.rows import conversations, gold, pictures
from data_pipelines.text import tables

Rows = Sequence[Mapping[str, Any]]
Paths = tuple[str, ...]

_TABLE = tables.read("data_pipelines.sources.rows", "columns.toml")
NAMES: dict[str, list[str]] = _TABLE["names"]
# These name other things than pictures too.
_WEAK = frozenset(NAMES["images"][NAMES["images"].index("file_name") :])
_NUMBERED_IMAGE = re.compile(r"(?:image|img|picture)_?(\d{1,2})")
_LETTERED = re.compile(r"(?:option|choice|opt|op)?_?([a-h])")


def paths(sample: Rows) -> dict[str, str]:
  """Each column, and each of verl's struct of answers, by name in the table."""
  found: dict[str, str] = {}
  inner: dict[str, str] = {}
  for row in sample:
    for name, value in row.items():
      found.setdefault(normal(name), name)
      if isinstance(value, Mapping) and name == "reward_model":
        for key in value:
          inner.setdefault(normal(f"{name}.{key}"), f"{name}.{key}")
  return {**inner, **found}


def normal(name: str) -> str:
  """The name in the spelling of the table: "Final Answer" as "final_answer"."""
  name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
  return re.sub(r"[^a-z0-9.]+", "_", name.casefold()).strip("_") or name


def value_at(row: Mapping[str, Any], path: str) -> Any:
  """The plain value at a path, with dots into structs; None for no such."""
  if path in row:
    return gold.plain(row[path])
  name, _, rest = path.partition(".")
  inner = row.get(name)
  return value_at(inner, rest) if rest and isinstance(inner, Mapping) else None


def unseen_images(row: Mapping[str, Any], known: Sequence[str]) -> Paths:
  """The first column for pictures that the first rows of the source lack."""
  new = (x for x in row if x not in known and normal(x) in NAMES["images"])
  return tuple(new)[:1]


def is_there(sample: Rows, path: str) -> bool:
  """True if a row has such a column, maybe with a null."""
  if any(path in row for row in sample):
    return True
  name, _, rest = path.partition(".")
  inner = [row[name] for row in sample if isinstance(row.get(name), Mapping)]
  return bool(rest) and is_there(inner, rest)


def guess(
  sample: Rows, known: Mapping[str, str], given: Mapping[str, Paths]
) -> tuple[dict[str, Paths], list[str]]:
  """The columns of each role, and notes on what was not taken.

  `known` is the result of `paths`; roles that are `given` are not guessed.
  """
  names = dict(given)
  taken = {path for found in given.values() for path in found}
  rivals: dict[str, list[str]] = {}
  for role in NAMES:
    if role in given:
      continue
    fitting = [x for x in _fitting(role, sample, known) if x not in taken]
    names[role] = tuple(fitting[:1])
    if not fitting:
      names[role] = _others(role, sample, known, taken)
    elif role in ("question", "answer"):
      texts = [[str(value_at(row, x))[:500] for row in sample] for x in fitting]
      pairs = zip(fitting, texts, strict=True)
      rivals[role] = [path for path, text in pairs if text != texts[0]]
      names[role] = _covering(sample, fitting)
    taken.update(names[role][:1] if role == "answer" else names[role])
  notes = [
    f"{role} is {names[role][0]}, not {', '.join(others)}"
    for role, paths in rivals.items()
    if (others := [path for path in paths if path not in taken])
  ]
  return names, notes


def _covering(sample: Rows, fitting: Sequence[str]) -> Paths:
  """The first column, and others that fill a tenth of the rows, empty there."""
  found: list[str] = []
  empty = list(sample)
  for path in fitting:
    rest = [row for row in empty if gold.is_missing(value_at(row, path))]
    if not found or 10 * (len(empty) - len(rest)) >= len(sample):
      found.append(path)
      empty = rest
  return tuple(found)


def _fitting(role: str, sample: Rows, known: Mapping[str, str]) -> list[str]:
  """The columns that may have the role, the likelier ones first."""
  named = [name for name in NAMES[role] if name in known]
  if role == "answer" and "b" in known:
    named = [name for name in named if name != "a"]  # An option.
  found = [
    known[name]
    for name in named
    if any(_fits(role, name, value_at(row, known[name])) for row in sample)
  ]
  if not found and role not in ("question", "context", "pid"):
    # Later rows may hold what the first ones lack.
    found = [
      known[name]
      for name in named
      if name not in _WEAK
      and all(gold.is_missing(value_at(row, known[name])) for row in sample)
    ]
  names = known.keys()
  is_pair = names & {*NAMES["chosen"]} and names & {*NAMES["rejected"]}
  if role in ("chosen", "rejected", "chosen_score", "rejected_score"):
    return found if is_pair else []
  if role == "response_label" and not names & {*NAMES["response"]}:
    return []
  if role == "pid":
    return [path for path in found if _is_unique(sample, path)]
  if role == "question" and is_pair:
    return [path for path in found if normal(path) != "messages"]
  if role == "context" and "instruction" in names and "input" in known:
    return [known["input"]]
  return found


def _others(
  role: str, sample: Rows, known: Mapping[str, str], taken: set[str]
) -> Paths:
  """Columns that no single name gives: image_1, image_2; A, B, C; pictures."""
  free = {name: path for name, path in known.items() if path not in taken}
  if role == "choices":
    found = _order_columns(free, _LETTERED)
    return found if len(found) > 1 else ()
  if role != "images":
    return ()
  held = [path for path in free.values() if holds_pictures(sample, path)]
  return _order_columns(free, _NUMBERED_IMAGE) or tuple(held[:1])


def holds_pictures(sample: Rows, path: str) -> bool:
  """True if a row has a picture there, not only a picture's name."""
  return any(gold.is_picture(value_at(row, path)) for row in sample)


def _order_columns(known: Mapping[str, str], pattern: re.Pattern[str]) -> Paths:
  """The columns that match, by their letter or number."""
  found = [
    (match[1].zfill(2), path)
    for name, path in known.items()
    if (match := pattern.fullmatch(name))
  ]
  return tuple(path for _, path in sorted(found))


def _fits(role: str, name: str, value: Any) -> bool:
  """True for a value that a column of this role may hold."""
  if gold.is_missing(value):
    return False
  if role in ("question", "chosen", "rejected", "response"):
    is_text = isinstance(value, str) and not pictures.is_picture_text(value)
    return is_text or conversations.messages(value) is not None
  if role == "response_label":
    return isinstance(value, bool)
  if role == "completions":
    first = value[0] if isinstance(value, list | tuple) else None
    return isinstance(first, Mapping) and {"text", "label"} <= first.keys()
  if role == "images":
    value = value[0] if isinstance(value, list | tuple) else value
    is_sure = gold.is_picture(value) or pictures.is_picture_text(value)
    return is_sure or name not in _WEAK
  if role in ("system", "context", "solution"):
    # Some call a kind of picture the context.
    return isinstance(value, str) and (name != "context" or len(value) > 80)
  return not gold.is_picture(value) and not pictures.is_picture_text(value)


def _is_unique(sample: Rows, path: str) -> bool:
  values = [value_at(row, path) for row in sample]
  texts = {str(x) for x in values if isinstance(x, str | int | float)}
  return len(texts) == len(values)
