"""Joining the processes of a run, and leaving it.

A launcher says how many there are, or the metadata of a TPU does; a program
started alone is one process. That one has a coordinator of its own too, on the
loopback: with it comes JAX's notice of a preemption, which is why no file of
this project sets a handler for SIGTERM.

References:
  https://docs.jax.dev/en/latest/multi_process.html
"""

import dataclasses
import functools
import glob
import importlib.util
import json
import logging as std_logging
import multiprocessing
import os
import socket
import sys
import time
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from data_pipelines.validation import require_all

# A pod's hosts end alike or one of them ends alone, and cannot know which. So
# long it waits for the others to end with the same code, before it leaves them.
_FAREWELL_SECONDS = 2


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """How long the processes of a run wait for each other.

  Attributes:
    initialization_timeout_seconds: For all to have joined; whoever waits longer
      is ended by JAX, with SIGABRT.
    heartbeat_timeout_seconds: Of silence, until a process counts as dead and
      JAX ends the others.
    shutdown_timeout_seconds: For all to have reached the end.
    preflight_timeout_seconds: For all to have said what they are about to run.
    watchdog_seconds: Without any progress, until a process dumps the stacks of
      its threads and exits with 76; 0 for never.
    watchdog_start_seconds: The same until the first step is done, which
      compiles.
  """

  initialization_timeout_seconds: int
  heartbeat_timeout_seconds: int
  shutdown_timeout_seconds: int
  preflight_timeout_seconds: int
  watchdog_seconds: float
  watchdog_start_seconds: float

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name, value = field.name, getattr(self, field.name)
      least = 0 if name.startswith("watchdog") else 1
      holds = least <= value < float("inf")
      rule = f"be at least {least} and finite, in seconds"
      require_all(self, "distributed", (name, holds, rule, 60))
    require_all(
      self,
      "distributed",
      (
        "watchdog_start_seconds",
        self.watchdog_seconds <= self.watchdog_start_seconds,
        f"be at least distributed.watchdog_seconds ({self.watchdog_seconds!r}),"
        " because the first step compiles",
        self.watchdog_seconds,
      ),
    )


@dataclasses.dataclass(frozen=True)
class ProcessAddress:
  """Where a process joins.

  Attributes:
    coordinator_address: HOST:PORT of process 0.
    num_processes: How many there are.
    process_id: This one's number, from 0.
  """

  coordinator_address: str
  num_processes: int
  process_id: int


def read_process_address(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> ProcessAddress | None:
  """What a launcher says, by flags or by environment; None if it is silent.

  An argument that is None is taken from `JAX_COORDINATOR_ADDRESS`,
  `JAX_NUM_PROCESSES` or `JAX_PROCESS_ID`.

  Raises:
    ValueError: It says a part only, or what cannot be.
  """
  given = {
    "coordinator_address": coordinator_address,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  for name, value in given.items():
    if value is None:
      given[name] = os.environ.get(f"JAX_{name.upper()}") or None
  if given["coordinator_address"] is None and not (num_processes or process_id):
    return None
  missing = [name for name, value in given.items() if value is None]
  if missing:
    raise ValueError(
      f"--{missing[0]} (None) must be given where a launcher gives any of "
      f"{', '.join(f'--{name}' for name in given)}; give it, or set "
      f"JAX_{missing[0].upper()}."
    )
  address = str(given["coordinator_address"])
  host, _, port = address.rpartition(":")
  if not (host and port.isdecimal() and 0 < int(port) < 2**16):
    raise ValueError(
      f"--coordinator_address ({address!r}) must be HOST:PORT of process 0; "
      "give both, as in 10.0.0.1:8476."
    )
  numbers = []
  for name in ("num_processes", "process_id"):
    try:
      numbers.append(int(str(given[name])))
    except ValueError as error:
      raise ValueError(
        f"--{name} ({given[name]!r}) must be a whole number; give one."
      ) from error
  count, index = numbers
  if not 0 <= index < count:
    raise ValueError(
      f"--process_id ({index}) must be at least 0 and below --num_processes "
      f"({count}); number the processes from 0."
    )
  return ProcessAddress(address, count, index)


def initialize(
  config: DistributedConfig, joined: ProcessAddress | None
) -> None:
  """Joins the other processes of the run, before any device is touched.

  A failure to join ends the program: a host that went on alone would train a
  model of its own. One that waits in vain is ended by JAX itself, in C++, with
  SIGABRT, which a shell sees as 134.

  Args:
    config: How long to wait.
    joined: What a launcher says. None asks the metadata of a TPU, if this is
      one, and stays alone if not.
  """
  _settle_platform()
  join = functools.partial(
    jax.distributed.initialize,
    initialization_timeout=config.initialization_timeout_seconds,
    heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
    shutdown_timeout_seconds=config.shutdown_timeout_seconds,
  )
  if joined:
    logging.info(
      "Process %d of %d joins the others at %s, and waits %d s at most.",
      joined.process_id,
      joined.num_processes,
      joined.coordinator_address,
      config.initialization_timeout_seconds,
    )
    join(joined.coordinator_address, joined.num_processes, joined.process_id)
  elif _has_tpu():
    join()
  else:
    address = f"127.0.0.1:{_free_port()}"
    join(address, 1, 0, coordinator_bind_address=address)
  logging.info(
    "Process %d of %d on %s, %d of %d devices: %s",
    jax.process_index(),
    jax.process_count(),
    socket.gethostname(),
    jax.local_device_count(),
    jax.device_count(),
    jax.devices()[0].device_kind,
  )


def exchange_json(
  topic: str, value: Any, *, timeout_seconds: float
) -> list[Any]:
  """What every process says on a topic, by process; each must say something.

  Goes by way of the coordinator and touches no device, so that processes which
  could not compute together can still find out why.

  Args:
    topic: A word that no earlier call had.
    value: What this process says, as JSON would hold it.
    timeout_seconds: How long to wait for the others.

  Raises:
    RuntimeError: Not all said something in time; JAX names who did not.
  """
  if jax.process_count() == 1:
    return [value]
  client = _state().client
  folder = f"grpo_tpu/{topic}"
  client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
  client.wait_at_barrier(folder, round(timeout_seconds * 1000))
  said = dict(client.key_value_dir_get(folder))
  return [
    json.loads(said[f"{folder}/{index}"])
    for index in range(jax.process_count())
  ]


def straggler_metrics(alone_seconds: float) -> dict[str, float]:
  """Which host was slowest at what it did alone, by the names of `metrics`.

  All processes must call it. One device that is slow cannot be told this way:
  all hosts wait for it alike.

  Args:
    alone_seconds: What this host has spent without waiting for another.
  """
  if jax.process_count() == 1:
    return {}
  seconds = multihost_utils.process_allgather(np.float32(alone_seconds))
  slowest = int(np.argmax(seconds))
  return {
    "perf/slowest_host": slowest,
    "perf/straggler_seconds": float(seconds[slowest] - np.median(seconds)),
  }


def shutdown(code: int) -> NoReturn:
  """Ends this process with an exit code, and so, within seconds, the others.

  Where all leave at once, each does with its own code. Peers of one that leaves
  alone wait for it in a collective, which fails as soon as it is gone; a normal
  exit would first wait for them at a barrier which they never reach.
  """
  for child in multiprocessing.active_children():
    child.terminate()
  state = _state()
  # Not by `jax.process_count`, which would start the devices.
  if state.client is not None and state.num_processes > 1:
    try:
      _say_farewell(state)
    except Exception as error:  # Of whatever kind: there is nobody to tell.
      logging.warning("Leaves the others behind: %s", error)
  std_logging.shutdown()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _say_farewell(state: Any) -> None:
  """Waits a little for all processes to be leaving, the coordinator longest.

  Not at JAX's barriers: one that fails ends the program with SIGABRT, after
  the heartbeat time-out.
  """
  folder = "grpo_tpu/leave"
  state.client.key_value_set(f"{folder}/{state.process_id}", "")
  deadline = time.monotonic() + _FAREWELL_SECONDS
  while time.monotonic() < deadline:
    if len(state.client.key_value_dir_get(folder)) == state.num_processes:
      # Whoever is left without a coordinator is aborted.
      time.sleep(0.5 if state.process_id == 0 else 0.0)
      return
    time.sleep(0.05)
  # Those who leave later must not take it for one who waits for them.
  state.client.key_value_delete(f"{folder}/{state.process_id}")


def _state() -> Any:
  # JAX has no public name for the client; Orbax takes it from here as well.
  from jax._src import distributed

  return distributed.global_state


def _settle_platform() -> None:
  """Has JAX compute on the CPU where libtpu is installed and no chip is here.

  It would come to that by itself, after libtpu, which comes with the tools that
  plan, has looked for chips and printed errors for want of them.
  """
  is_open = not jax.config.jax_platforms
  if is_open and importlib.util.find_spec("libtpu") and not _has_tpu():
    logging.info(
      "No TPU is here, so the CPU computes; JAX_PLATFORMS names another."
    )
    jax.config.update("jax_platforms", "cpu")


def _has_tpu() -> bool:
  """Whether this is a TPU host, and its chips are meant to be used."""
  platforms = jax.config.jax_platforms
  is_wanted = not platforms or "tpu" in platforms.split(",")
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  return is_wanted and bool(chips)


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]
