"""Reads the TOML tables of words and figures that stand beside modules."""

import importlib.resources
import tomllib
from typing import Any


def read(package: str, name: str) -> dict[str, Any]:
  """The content of the TOML file `name` in a package."""
  file = importlib.resources.files(package).joinpath(name)
  return tomllib.loads(file.read_text("utf-8"))
