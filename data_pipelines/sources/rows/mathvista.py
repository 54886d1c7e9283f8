"""MathVista's schema and its terms, which forbid training on its own records.

References:
  The snapshot: https://huggingface.co/datasets/AI4Math/MathVista
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipelines import records
from data_pipelines.sources.rows import choices, gold, metadata, pictures
from data_pipelines.text import tables, untrusted

# Values of `metadata.source`; MathVista's terms cover all of them.
_TABLE = tables.read("data_pipelines.sources.rows", "mathvista.toml")
SOURCES = frozenset(_TABLE["sources"])
_COLUMNS = frozenset(records.FIELDS) | {"image", "decoded_image"}
_HINTED = _TABLE["hints"]
_SPELLINGS = tables.read("data_pipelines.sources.rows", "columns.toml")


def is_original(metadata: Mapping[str, Any]) -> bool:
  """True for a record of MathVista's splits, whose terms forbid training."""
  has_split = metadata.get("split") in ("testmini", "test")
  return has_split and metadata.get("source") in SOURCES


def terms(num_original: int, num_problems: int) -> str:
  """The terms that forbid training on such a mixture: "mathvista", or "".

  Few originals prove nothing: other sets in this schema may have such sources.
  """
  return "mathvista" if 20 * num_original > num_problems else ""


def is_schema(sample: Sequence[Mapping[str, Any]]) -> bool:
  """True if most rows have MathVista's columns, with types that it knows."""
  fits = [
    "question" in row
    and _spelling("question_types", row.get("question_type"))
    in records.QUESTION_TYPES
    and _spelling("answer_types", row.get("answer_type")) in _HINTED
    for row in sample
  ]
  return 2 * sum(fits) > len(fits)


def to_problem(
  values: Mapping[str, Any], read_file: Callable[[str], bytes]
) -> records.Problem:
  """The problem of a row in MathVista's schema, with the official query.

  Other spellings of a good record are healed.
  """
  healed = {k: v for k, v in values.items() if not gold.is_missing(v)}
  images = []
  for name in ("decoded_image", "image"):
    images = images or pictures.read(values.get(name), name, read_file)
  for name in ("question_type", "answer_type"):
    healed[name] = _spelling(f"{name}s", values.get(name))
  for name in ("pid", "unit", "answer"):
    value = gold.plain(healed.get(name, ""))
    is_number = isinstance(value, int | float)
    healed[name] = gold.read(value, name).answer if is_number else value
  if not isinstance(image := healed.get("image"), str):
    image = image.get("path") if isinstance(image, Mapping) else None
  healed["image"] = image if isinstance(image, str) and len(image) < 300 else ""
  given = values.get("choices")
  found = choices.read(given, "choices")
  is_plain = isinstance(given, list) and all(isinstance(x, str) for x in given)
  healed["choices"] = tuple(given) if given and is_plain else found.texts
  if healed["question_type"] == "multi_choice":
    healed["answer_type"] = "text"
    if (answer := healed["answer"]) and answer not in healed["choices"]:
      found = found._replace(texts=healed["choices"])
      healed["answer"] = choices.right_option(answer, found, "answer", None)
  elif healed["answer_type"] in ("integer", "float"):
    read = gold.read(healed["answer"], "answer") if healed["answer"] else None
    precision = gold.to_float(healed.get("precision")) or -1
    if read and read.answer_type == "float" and precision < 1:
      healed |= {"answer_type": "float", "precision": read.precision}
  types = {"question_type": records.QUESTION_TYPES, "answer_type": [*_HINTED]}
  for name, known in types.items():
    if healed[name] not in known:
      raise records.BadRecord(
        f"unknown_{name}",
        f"{name} {untrusted.shorten(healed[name])} is none of "
        f"{', '.join(known)}; correct it, or leave both columns of types out "
        "to have them inferred",
      )
  others = {k: v for k, v in values.items() if k not in _COLUMNS}
  own = healed.get("metadata")
  if isinstance(own, Mapping) and others:
    healed["metadata"] = {**metadata.read(others), **own}
  return dataclasses.replace(records.from_result(healed), images=tuple(images))


def _spelling(table: str, value: Any) -> Any:
  """MathVista's name of a type that is spelt in another way."""
  given = value.casefold() if isinstance(value, str) else ""
  text = re.sub("[^a-z]", "", given)
  names = (ours for ours, theirs in _SPELLINGS[table].items() if text in theirs)
  return next(names, value)
