"""Reads the words, figures and patterns that stand in TOML files."""

import functools
import importlib.resources
import re
import tomllib
import types
from typing import Any


@functools.cache
def read(package: str, name: str) -> dict[str, Any]:
  """The content of the TOML file `name` in a package."""
  file = importlib.resources.files(package).joinpath(name)
  return tomllib.loads(file.read_text("utf-8"))


def patterns(
  section: str, package: str = "data_pipelines.verifier"
) -> types.SimpleNamespace:
  """The patterns of a section of a package's `patterns.toml`, as attributes."""
  texts = read(package, "patterns.toml")[section]
  return types.SimpleNamespace(
    **{
      name: re.compile("".join(map(str.lstrip, text.splitlines())))
      for name, text in texts.items()
    }
  )
