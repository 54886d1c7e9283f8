"""Builds frozen dataclasses of settings from nested mappings of values."""

import dataclasses
import difflib
import types
import typing
from typing import Any


def build_section(cls: type, values: Any, prefix: str = "") -> Any:
  """Builds a dataclass, and the dataclasses among its fields.

  Args:
    cls: The dataclass; every field must have a value.
    values: A mapping, or a ConfigDict.
    prefix: The section's name and a dot, as in "data.synthetic."; "" for a
      whole config.

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
      close = difflib.get_close_matches(name, names, n=1) or names[:1]
      raise ValueError(
        f"{prefix}{name} ({given[name]!r}) is not a setting; did you mean "
        f"{prefix}{close[0]}?"
      )
  for name in names:
    if name not in given:
      raise ValueError(
        f"{prefix}{name} is missing; start from "
        "grpo_tpu.config.defaults.get_config(), which has every setting."
      )
  parsed = {
    name: _parse(hints[name], given[name], f"{prefix}{name}") for name in names
  }
  try:
    return cls(**parsed)
  except ValueError as error:
    if str(error).startswith(prefix):
      raise
    # Classes with other users too do not know the name of their section.
    raise ValueError(f"{prefix}{error}") from error


def _parse(hint: Any, value: Any, name: str) -> Any:
  """The value of a setting, checked against the annotation of its field."""
  if dataclasses.is_dataclass(hint):
    return build_section(typing.cast(type, hint), value, f"{name}.")
  if isinstance(hint, types.UnionType):
    if value is None and types.NoneType in hint.__args__:
      return None
    hint = next(x for x in hint.__args__ if x is not types.NoneType)
  if typing.get_origin(hint) is tuple:
    item = typing.get_args(hint)[0]
    if isinstance(value, list | tuple):
      return tuple(_parse(item, x, name) for x in value)
    wanted = f"a tuple of {item.__name__}"
  else:
    if hint is float and type(value) is int:
      return float(value)
    # bool is an int to Python, but True is not a number of steps.
    if type(value) is hint:
      return value
    wanted = hint.__name__
  raise ValueError(
    f"{name} ({value!r}) must be of type {wanted}, not "
    f"{type(value).__name__}; write it like its default."
  )
