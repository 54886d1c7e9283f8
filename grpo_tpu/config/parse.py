"""Builds frozen dataclasses of settings from nested mappings of values."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from typing import Any

from data_pipelines.text import untrusted


def build_section(cls: type, values: Any, prefix: str = "") -> Any:
  """Builds a dataclass, and the dataclasses among its fields.

  Args:
    cls: The dataclass; every field must have a value.
    values: A mapping, or a ConfigDict.
    prefix: The section's name, as in "data.synthetic."; "" for a whole config.

  Raises:
    ValueError: A setting is missing, unknown, of the wrong type, or breaks a
      rule; the message names setting, value, rule and remedy.
  """
  hints = typing.get_type_hints(cls)
  names = [field.name for field in dataclasses.fields(cls)]
  if not hasattr(values, "items"):
    raise ValueError(
      f"{prefix.rstrip('.')} ({values!r}) must be a section of settings; set "
      f"one of its parts, as in {prefix}{names[0]}=..."
    )
  given = dict(values.items())
  for name in given:
    if name not in names:
      raise ValueError(describe_unknown(prefix, name, names))
  for name in names:
    if name not in given:
      raise ValueError(
        f"{prefix}{name} is missing; start from "
        "grpo_tpu.config.defaults.get_config(), which has every setting."
      )
  parsed = {}
  for each in dataclasses.fields(cls):
    name = f"{prefix}{each.name}"
    like = each.metadata.get("like", "its default")
    value = _parse(hints[each.name], given[each.name], name, like=like)
    expand = each.metadata.get("expand", lambda name, value: value)
    parsed[each.name] = expand(name, value)
  try:
    return cls(**parsed)
  except ValueError as error:
    if str(error).startswith(prefix):
      raise
    # Classes with other users too do not know the name of their section.
    raise ValueError(f"{prefix}{error}") from error


def describe_unknown(prefix: str, name: str, names: Sequence[str]) -> str:
  """An error that names the settings of a section, and asks for a similar one.

  A similar spelling may mean something else, so it is only a question.
  """
  close = difflib.get_close_matches(name, names, n=1)
  question = f"; did you mean {prefix}{close[0]}?" if close else "."
  section = prefix.rstrip(".") or "a config"
  held = f"has {', '.join(names)}" if names else "is no section"
  return f"{prefix}{name} is not a setting: {section} {held}{question}"


def _parse(hint: Any, value: Any, name: str, *, like: Any) -> Any:
  """The value of a setting, checked against the annotation of its field."""
  if dataclasses.is_dataclass(hint):
    return build_section(typing.cast(type, hint), value, f"{name}.")
  if isinstance(hint, types.UnionType):
    if value is None and types.NoneType in hint.__args__:
      return None
    hint = next(x for x in hint.__args__ if x is not types.NoneType)
  if typing.get_origin(hint) is tuple:
    items = typing.get_args(hint)
    is_list = isinstance(value, list | tuple)
    if is_list and items[-1] is ...:
      items = items[:1] * len(value)
    if is_list and len(items) == len(value):
      pairs = zip(items, value, strict=True)
      return tuple(_parse(item, x, name, like=like) for item, x in pairs)
    wanted = " and ".join(x.__name__ for x in items if x is not ...)
    wanted = f"a tuple of {wanted}"
  else:
    # bool is an int to Python, but True is not a number of steps.
    if type(value) is int and hint in (int, float):
      if abs(value) >= 2**31:
        raise ValueError(
          f"{name} ({untrusted.shorten(value)}) must be a number that fits in "
          "32 bits."
        )
      return hint(value)
    if type(value) is hint:
      return value
    wanted = hint.__name__
  raise ValueError(
    f"{name} ({value!r}) must be of type {wanted}, not "
    f"{type(value).__name__}; write it like {like}."
  )
