"""Keeps the other columns of a row as JSON, without pictures."""

import json
from collections.abc import Mapping
from typing import Any

from data_pipelines import records
from data_pipelines.sources.rows import gold

# Characters of JSON of one record.
_MAX_LENGTH = 30_000


def read(values: Mapping[str, Any]) -> dict[str, Any]:
  """The values that JSON can hold, each only while there is room for it.

  Columns that name slices of a score become text.
  """
  kept: dict[str, Any] = {}
  room = _MAX_LENGTH
  encode = json.JSONEncoder(
    default=_to_json, allow_nan=False, ensure_ascii=False
  ).encode
  for name, value in values.items():
    if not records.is_shallow(value):
      continue
    try:
      text = encode(value)
      text = text.encode(errors="ignore").decode().replace("\\u0000", "")
      value = json.loads(text)
    except (ValueError, TypeError):
      continue
    if value in (None, "", [], {}) or len(text) > room:
      continue
    room -= len(text)
    if name == "skills" and isinstance(value, list):
      value = [x if isinstance(x, str) else json.dumps(x) for x in value]
    elif name == "skills" and not isinstance(value, str):
      value = json.dumps(value)
    elif name in records.SLICES and isinstance(value, list | dict):
      value = json.dumps(value)
    kept[str(name)] = value
  return kept


def _to_json(value: Any) -> Any:
  """A value that JSON does not know as one that it does; null for bytes."""
  if isinstance(value, bytes | bytearray):
    return None
  plain = gold.plain(value)
  return str(value) if plain is value else plain
