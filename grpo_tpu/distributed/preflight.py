"""Before the first step: do all hosts mean the same run?

A pod whose hosts differ in a setting, a line of code or a library would train
on, each host a little otherwise, or wait for ever in a collective that only
some of them have. Here they say what they are about to run, and whoever differs
is named, with what differs.
"""

import hashlib
import json
import pathlib
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from absl import logging

from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import initialize

# What arithmetic or the order of the data rests on.
_PACKAGES = (
  *("jax", "jaxlib", "libtpu", "numpy", "ml_dtypes", "flax", "optax"),
  *("orbax-checkpoint", "tensorstore", "grain", "array_record", "pillow"),
  *("sentencepiece", "tokenizers", "jinja2", "ml-collections"),
)
ROOT = pathlib.Path(__file__).resolve().parents[2]
_OURS = ("grpo_tpu", "data_pipelines")
_SHOWN = 5

# By field, by name within the field.
type Facts = Mapping[str, Mapping[str, Any]]


def facts(
  config: run_config.Config,
  identity: Mapping[str, str],
  *,
  mode: str,
  workdir: str,
) -> Facts:
  """What this host is about to run, by field.

  Args:
    config: The run's settings.
    identity: Of its data and tokenizers, as in `dataset.Dataset`.
    mode: Of the program.
    workdir: Of the run.
  """
  return {
    "flag": {"--mode": mode, "--workdir": workdir},
    "config": dict(_flat(config.to_dict())),
    "code": code(ROOT),
    "package": packages(),
    "data": dict(identity),
  }


def check(topic: str, said: Facts, *, timeout_seconds: float) -> None:
  """Returns if every process says the same; all processes must call it.

  Args:
    topic: A word that no earlier call had.
    said: By this process.
    timeout_seconds: How long to wait for the others.

  Raises:
    ValueError: On every process alike, naming who differs from host 0, in
      what, and what to do.
    RuntimeError: A process has not said anything in time.
  """
  digests = {field: _digest(values) for field, values in said.items()}
  hosts = initialize.exchange_json(
    f"{topic}/digests",
    {"name": f"{socket.gethostname()}, code {revision()}", "digests": digests},
    timeout_seconds=timeout_seconds,
  )
  first = hosts[0]["digests"]
  if all(host["digests"] == first for host in hosts):
    if len(hosts) > 1:
      logging.info("All %d hosts agree on %s.", len(hosts), ", ".join(said))
    return
  # Only now is it worth it to send everything.
  details = initialize.exchange_json(
    f"{topic}/details", said, timeout_seconds=timeout_seconds
  )
  differences = [
    f"host {index} ({hosts[index]['name']}): {difference}"
    for index in range(1, len(hosts))
    for difference in _differences(details[index], details[0])
  ]
  more = len(differences) - _SHOWN
  raise ValueError(
    f"all hosts must run the same, but not all do as host 0 "
    f"({hosts[0]['name']}): {'; '.join(differences[:_SHOWN])}"
    f"{f'; and {more} more' if more > 0 else ''}. Start every host with the"
    " same command, from the same code and packages."
  )


def code(root: pathlib.Path) -> dict[str, str]:
  """What each of our files holds; which commit a host is on may be unknown."""
  return {
    str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()[
      :12
    ]
    for package in _OURS
    for path in sorted((root / package).rglob("*.py"))
  }


def packages() -> dict[str, str]:
  """The versions of Python and of what a run's numbers rest on."""
  return {"python": platform.python_version()} | {
    name: _version(name) for name in _PACKAGES
  }


def revision() -> str:
  """What the code is called: of a checkout git's hash, and whether it is dirty.

  Of anything else, the version of the package.
  """
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


def _differences(here: Facts, there: Facts) -> Iterator[str]:
  """Each fact of a host that host 0 has otherwise, in words."""
  for field in sorted(here.keys() | there.keys()):
    mine, theirs = here.get(field, {}), there.get(field, {})
    for name in sorted(mine.keys() | theirs.keys()):
      value, other = mine.get(name, "nothing"), theirs.get(name, "nothing")
      if value != other:
        yield f"{field} {name} is {value}, host 0 has {other}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator:
  """Dotted names and their values, as JSON would give them back."""
  for name, value in values.items():
    if isinstance(value, Mapping):
      yield from _flat(value, f"{prefix}{name}.")
    else:
      yield f"{prefix}{name}", json.loads(json.dumps(value, default=str))


def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return "nothing"


def _digest(values: Mapping[str, Any]) -> str:
  text = json.dumps(values, sort_keys=True, default=str)
  return hashlib.sha256(text.encode()).hexdigest()
