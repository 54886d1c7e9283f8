"""The patterns of patterns.toml, compiled for the modules that use them."""

import re
import types

from data_pipelines import tables

_SECTIONS = tables.read("data_pipelines.verifier", "patterns.toml")


def load(section: str) -> types.SimpleNamespace:
  """The patterns of one section, each as an attribute."""
  return types.SimpleNamespace(
    **{
      name: re.compile("".join(map(str.lstrip, pattern.splitlines())))
      for name, pattern in _SECTIONS[section].items()
    }
  )
