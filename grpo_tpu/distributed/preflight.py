"""Checks, before any step, that all hosts are about to run the same.

Hosts that differ in a setting, a line of code or a library would train
differently, or wait for ever in a collective that only some of them have. Here
every host sends what it is about to run, and the error names the host that
differs and how.
"""

import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from data_pipelines.storage import objects, paths
from data_pipelines.validation import SettingError
from grpo_tpu.distributed import fingerprint, initialize

_SHOWN = 5
# A network file system may show a new file late.
_FILE_PATIENCE_SECONDS = 30.0

# Values by topic ("config", "code"), then by name.
type Facts = Mapping[str, Mapping[str, Any]]


def facts(
  settings: Mapping[str, Any],
  identity: Mapping[str, str],
  flags: Mapping[str, str],
) -> Facts:
  """The flags that all hosts share, settings, code, packages and data."""
  return {
    "flag": flags,
    "config": fingerprint.flatten(settings),
    "code": fingerprint.code_hashes(),
    "package": fingerprint.package_versions(),
    "data": dict(identity),
  }


def check(key: str, own: Facts, *, timeout_seconds: float) -> None:
  """Returns if every process has the same facts; all processes must call it.

  Args:
    key: A name that no other call uses.
    own: The facts of this process.
    timeout_seconds: The longest wait for the others.

  Raises:
    SettingError: Some host differs from host 0. Every process gets the same
      message, with the host, the difference and the remedy.
    RuntimeError: A process has not answered in time.
  """
  digests = {topic: fingerprint.digest(x) for topic, x in own.items()}
  name = f"{socket.gethostname()}, code {fingerprint.revision()}"
  hosts = initialize.exchange_json(
    f"{key}/digests",
    {"name": name, "digests": digests},
    timeout_seconds=timeout_seconds,
  )
  first = hosts[0]["digests"]
  if all(host["digests"] == first for host in hosts):
    if len(hosts) > 1:
      logging.info("All %d hosts agree on %s.", len(hosts), ", ".join(own))
    return
  # The details are large, so they are sent only if the digests differ.
  details = initialize.exchange_json(
    f"{key}/details", own, timeout_seconds=timeout_seconds
  )
  differences = [
    f"host {index} ({hosts[index]['name']}): {difference}"
    for index in range(1, len(hosts))
    for difference in _differences(details[index], details[0])
  ]
  shown = differences[:_SHOWN]
  if len(differences) > _SHOWN:
    shown.append(f"and {len(differences) - _SHOWN} more")
  raise SettingError(
    f"all hosts must run the same, but not all do as host 0 "
    f"({hosts[0]['name']}): {'; '.join(shown)}. Start every host with the same "
    "command, from the same code and packages."
  )


def check_workdir(key: str, workdir: str, *, timeout_seconds: float) -> None:
  """Returns if every process sees what process 0 writes in the workdir.

  Args:
    key: A name that no other call uses.
    workdir: A folder, which is made if there is none, or a path in a bucket.
    timeout_seconds: The longest wait for the others.

  Raises:
    SettingError: Some host sees another folder, or the bucket refuses.
    OSError: Process 0 cannot write there, or the bucket does not answer.
    RuntimeError: A process has not answered in time.
  """
  if jax.process_count() == 1 and not paths.is_remote(workdir):
    return
  name, is_first = f".{uuid.uuid4().hex}.seen", jax.process_index() == 0
  if is_first:
    paths.write_whole(paths.make_folder(workdir) / name, b"")
  name = initialize.exchange_json(
    f"{key}/name", name, timeout_seconds=timeout_seconds
  )[0]
  patience = min(_FILE_PATIENCE_SECONDS, timeout_seconds / 2)
  deadline, file = time.monotonic() + patience, epath.Path(workdir) / name
  while not (is_seen := objects.exists(file, what="--workdir")):
    if time.monotonic() > deadline:
      break
    time.sleep(0.1)
  seen = [socket.gethostname(), is_seen]
  hosts = initialize.exchange_json(
    f"{key}/seen", seen, timeout_seconds=timeout_seconds
  )
  if is_first:
    file.unlink()
  blind = [f"{i} ({host[0]})" for i, host in enumerate(hosts) if not host[1]]
  if blind:
    raise SettingError(
      f"--workdir ({workdir!r}) must be one folder for all hosts, but host "
      f"{', '.join(blind)} does not see what host 0 ({hosts[0][0]}) wrote "
      "there; name a path in a bucket, or in a file system that all share."
    )


def _differences(here: Facts, there: Facts) -> Iterator[str]:
  """Each fact in which a host differs from host 0, in words."""
  for topic in sorted(here.keys() | there.keys()):
    facts = here.get(topic, {}), there.get(topic, {})
    different = fingerprint.diff(*facts, default=lambda name: "nothing")
    for name, (value, other) in different.items():
      yield f"{topic} {name} is {value}, host 0 has {other}"
