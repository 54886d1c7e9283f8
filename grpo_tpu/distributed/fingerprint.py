"""Settings, code and packages as names and values that can be compared."""

import hashlib
import json
import pathlib
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Tables of words, sizes and metrics are code too.
_CODE = (".py", ".toml", ".j2")
_OURS = ("grpo_tpu", "data_pipelines")
# The packages that decide the arithmetic or the order of the data.
_PACKAGES = (
  *("jax", "jaxlib", "libtpu", "numpy", "ml_dtypes", "flax", "optax"),
  *("orbax-checkpoint", "tensorstore", "grain", "array_record", "pillow"),
  *("sentencepiece", "tokenizers", "jinja2", "ml-collections"),
)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Dotted names and the values that JSON would give back."""
  flat = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = json.loads(json.dumps(value, default=str))
  return flat


def diff(
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  default: Callable[[str], Any],
) -> dict[str, tuple[Any, Any]]:
  """Old and new value of each name whose flat values differ, sorted by name.

  `default` gives the value of a name that one of the two does not have.
  """
  values = {
    name: tuple(x[name] if name in x else default(name) for x in (old, new))
    for name in sorted(old.keys() | new.keys())
  }
  return {name: each for name, each in values.items() if each[0] != each[1]}


def code_hashes(root: pathlib.Path = ROOT) -> dict[str, str]:
  """A hash of each of our files; the commit of a host may be unknown."""
  hashes = {}
  for package in _OURS:
    files = (root / package).rglob("*")
    for path in sorted(x for x in files if x.suffix in _CODE):
      content = hashlib.sha256(path.read_bytes())
      hashes[str(path.relative_to(root))] = content.hexdigest()[:12]
  return hashes


def package_versions() -> dict[str, str]:
  """Versions of Python and of the packages that decide a run's numbers."""
  return {"python": platform.python_version()} | {
    name: _version(name) for name in _PACKAGES
  }


def revision() -> str:
  """Git's hash of a checkout, marked if dirty, or the package's version."""
  try:
    return subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=12"],
      cwd=ROOT,
      capture_output=True,
      check=True,
      text=True,
      timeout=10,
    ).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return _version("grpo_tpu")


def digest(values: Mapping[str, Any]) -> str:
  """A hash of flat values that does not depend on their order."""
  text = json.dumps(values, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return "nothing"
