"""Starts `jax.distributed` for the processes of a run, and shuts it down.

A launcher or the metadata of a TPU gives the number of processes; otherwise the
program is one process. A single process has a coordinator too, on the loopback
interface, because JAX's notice of a preemption needs one. Therefore no file of
this project sets a handler for SIGTERM.

References:
  https://docs.jax.dev/en/latest/multi_process.html
"""

import functools
import importlib.util
import json
import logging as std_logging
import multiprocessing
import os
import socket
import sys
import time
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from data_pipelines.validation import require
from grpo_tpu.distributed import tpu_host
from grpo_tpu.distributed.settings import DistributedConfig

# A process cannot know whether the others exit now as well. It waits this long
# for them, so that each of them can exit with its own code.
_SHUTDOWN_SECONDS = 2


class ProcessAddress(NamedTuple):
  """The index of a process in a run, and the address of process 0."""

  coordinator_address: str  # HOST:PORT of process 0.
  num_processes: int
  process_id: int  # From 0.


def read_process_address(
  coordinator_address: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> ProcessAddress | None:
  """The address from a launcher's flags or environment; None without either.

  An argument that is None is read from `JAX_COORDINATOR_ADDRESS`,
  `JAX_NUM_PROCESSES` or `JAX_PROCESS_ID`.

  Raises:
    ValueError: A part is missing or invalid.
  """
  given = (coordinator_address, num_processes, process_id)
  parts = dict(zip(ProcessAddress._fields, given, strict=True))
  for name, value in parts.items():
    if value is None:
      parts[name] = os.environ.get(f"JAX_{name.upper()}") or None
  if parts["coordinator_address"] is None and not (num_processes or process_id):
    return None
  rule = f"be given together with {', '.join(f'--{name}' for name in parts)}"
  for name, value in parts.items():
    remedy = f"give it, or set JAX_{name.upper()}"
    require(value is not None, f"--{name}", value, rule, remedy)
  address = str(parts["coordinator_address"])
  host, _, port = address.rpartition(":")
  is_address = bool(host) and port.isdecimal() and 0 < int(port) < 2**16
  rule, remedy = "be HOST:PORT of process 0", "give it, as in 10.0.0.1:8476"
  require(is_address, "--coordinator_address", address, rule, remedy)
  for name in ("num_processes", "process_id"):
    is_whole = str(parts[name]).isdecimal()
    require(is_whole, f"--{name}", parts[name], "be a whole number", "give one")
  count, index = int(str(parts["num_processes"])), int(str(parts["process_id"]))
  rule = f"be at least 0 and below --num_processes ({count})"
  remedy = "number the processes from 0"
  require(index < count, "--process_id", index, rule, remedy)
  return ProcessAddress(address, count, index)


def initialize(
  config: DistributedConfig, address: ProcessAddress | None
) -> None:
  """Joins the other processes of the run, before any device is started.

  A failure to join ends the program, because a host that continued alone would
  train a separate model. After the time limit JAX itself ends the process from
  C++ with SIGABRT, which a shell reports as 134.

  Args:
    config: The time limits.
    address: The address from a launcher. None asks the metadata of a TPU host;
      where the environment names one host, as on Kaggle, and elsewhere the
      program is a single process.
  """
  _choose_platform()
  join = functools.partial(
    jax.distributed.initialize,
    initialization_timeout=config.initialization_timeout_seconds,
    heartbeat_timeout_seconds=config.heartbeat_timeout_seconds,
    shutdown_timeout_seconds=config.shutdown_timeout_seconds,
  )
  if address:
    logging.info(
      "Process %d of %d joins the others at %s (time limit %d s).",
      *(address.process_id, address.num_processes),
      *(address.coordinator_address, config.initialization_timeout_seconds),
    )
    join(*address)
  elif _has_tpu() and len(tpu_host.hosts_in_environment()) != 1:
    join()
  else:
    loopback = f"127.0.0.1:{_free_port()}"
    join(
      *(loopback, 1, 0),
      coordinator_bind_address=loopback,
      # Otherwise JAX asks the metadata server, which a notebook cannot reach.
      cluster_detection_method="deactivate",
    )
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
  """Sends a value to all processes and returns the values by process index.

  The coordinator passes the values on and no device takes part, so processes
  that cannot compute together can still find out why.

  Args:
    topic: A key that no earlier call used.
    value: The value of this process, which JSON can hold.
    timeout_seconds: Time limit for the other processes.

  Raises:
    RuntimeError: A process sent nothing in time; JAX names the process.
  """
  num_processes = jax.process_count()
  if num_processes == 1:
    return [value]
  client, folder = _state().client, f"grpo_tpu/{topic}"
  client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
  client.wait_at_barrier(folder, round(timeout_seconds * 1000))
  values = dict(client.key_value_dir_get(folder))
  return [json.loads(values[f"{folder}/{i}"]) for i in range(num_processes)]


def straggler_metrics(alone_seconds: float) -> dict[str, float]:
  """The metrics of the slowest host; all processes must call it.

  `alone_seconds` is the time in which this host did not wait for the others.
  One slow device does not show here, because all hosts wait for it.
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
  """Ends this process with an exit code, and within seconds the others too.

  If all processes shut down at once, each exits with its own code. Otherwise
  the others wait for this one in a collective, which fails when it is gone. A
  normal exit would wait for them at a barrier that they never reach.
  """
  try:
    for child in multiprocessing.active_children():
      child.terminate()
    state = _state()
    # Not by `jax.process_count`, which would start the devices.
    if state.client is not None and state.num_processes > 1:
      _wait_for_others(state)
    std_logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
  except Exception as error:  # Nothing may change the exit code.
    logging.warning("Exiting without waiting for other processes: %s", error)
  finally:
    os._exit(code)


def _wait_for_others(state: Any) -> None:
  """Waits a little for all processes to shut down, the coordinator longest.

  A barrier of JAX would not do: if it fails, JAX ends the program with SIGABRT
  after the heartbeat time limit.
  """
  folder = "grpo_tpu/shutdown"
  state.client.key_value_set(f"{folder}/{state.process_id}", "")
  deadline = time.monotonic() + _SHUTDOWN_SECONDS
  while time.monotonic() < deadline:
    if len(state.client.key_value_dir_get(folder)) == state.num_processes:
      # JAX aborts a process that has lost its coordinator.
      time.sleep(0.5 if state.process_id == 0 else 0.0)
      return
    time.sleep(0.05)
  # A process that shuts down later must not count this one as waiting.
  state.client.key_value_delete(f"{folder}/{state.process_id}")


def _state() -> Any:
  # JAX has no public name for the client; Orbax uses this one too.
  from jax._src import distributed

  return distributed.global_state


def _choose_platform() -> None:
  """Selects the CPU on a machine that has libtpu but no TPU.

  JAX would do the same, but only after libtpu, which planning needs, has looked
  for chips and printed errors.
  """
  is_unset = not jax.config.jax_platforms
  if is_unset and importlib.util.find_spec("libtpu") and not _has_tpu():
    logging.info("No TPU found: using the CPU (set JAX_PLATFORMS to override).")
    jax.config.update("jax_platforms", "cpu")


def _has_tpu() -> bool:
  """True on a TPU host, unless the user chose another platform."""
  platforms = jax.config.jax_platforms
  is_wanted = not platforms or "tpu" in platforms.split(",")
  return is_wanted and bool(tpu_host.find_chips())


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]
