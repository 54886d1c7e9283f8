"""Compiles the programs of a run for a described slice and sums up their needs.

Each program is compiled in a process of its own until its memory is known.
Times are never measured here: seconds are quotients of work and the makers'
peaks, and bounds that no run can beat.
"""

import concurrent.futures
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from multiprocessing import resource_tracker
from typing import Any

import jax
from absl import logging

from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import hardware
from grpo_tpu.distributed.hardware import Topology
from grpo_tpu.planning import aot, arrays, flops, programs, roofline

# Each process takes a core and one or two gigabytes of this machine's memory.
_MAX_PROCESSES = 4
# Files in which a worker leaves its results and its messages.
_ANSWER, _OUTPUT = "answer.json", "output.txt"


@dataclasses.dataclass(frozen=True)
class Plan:
  """The needs of a run on a slice."""

  config: Config
  topology: Topology
  programs: list[dict[str, Any]]  # As in `plan.json`.
  resident: dict[str, int]  # Bytes per device that stay, by class.

  @property
  def peak(self) -> dict[str, Any]:
    """The program that needs most memory, resident arrays included."""
    return max(self.programs, key=lambda x: x["resident_bytes"])

  @property
  def room(self) -> float:
    """Free share of a device's memory at the peak; negative if it overflows."""
    limit = self.topology.chip.hbm_limit_bytes
    return 1 - self.peak["resident_bytes"] / limit

  def fits(self, margin: float = 0.0) -> bool:
    """Returns True if at least this share of the memory stays free."""
    return self.room >= margin

  def step_bounds(self) -> dict[str, Any]:
    """Bounds of a whole step; see `roofline.step_bounds`."""
    return roofline.step_bounds(self.config, self.topology, self.programs)

  def to_dict(self) -> dict[str, Any]:
    """The contents of `plan.json`."""
    return {
      "topology": str(self.topology),
      "slice": self.topology.slice_name,
      "chips": self.topology.num_chips,
      "model": self.config.model.name,
      "fits": self.fits(),
      "room": self.room,
      "hbm_limit_bytes": self.topology.chip.hbm_limit_bytes,
      "resident_bytes_by_class": self.resident,
      "programs": self.programs,
      "bounds": self.step_bounds(),
      "config": self.config.to_dict(),
    }


def check_compiler() -> None:
  """Checks that this machine has the compiler for TPUs.

  Raises:
    ValueError: It has not; the message says how to get it.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "--mode=plan needs libtpu, the compiler for TPUs, which runs without a "
      "TPU on Linux x86_64; install it there with "
      "`pip install -e '.[tpu]' -c constraints.txt`. macOS and arm64 have no "
      "libtpu: plan in a Linux x86_64 container or VM."
    )


class Compiler:
  """Compiles programs in parallel, each one only once."""

  def __init__(self):
    cores = len(os.sched_getaffinity(0))
    self.num_processes = min(cores, _MAX_PROCESSES)
    self._pool = concurrent.futures.ThreadPoolExecutor(self.num_processes)
    self._compiled: dict[str, concurrent.futures.Future[dict[str, Any]]] = {}

  @property
  def num_compiled(self) -> int:
    """Number of different programs compiled so far."""
    return len(self._compiled)

  def plan(
    self, config: Config, topology: Topology, names: Sequence[str] | None = None
  ) -> Plan:
    """Compiles the named programs of a run for a slice, by default all."""
    futures = []
    for name in programs.names(config) if names is None else names:
      settings = relevant_settings(config, name)
      key = json.dumps([settings, str(topology), name])
      if key not in self._compiled:
        args = compile_program, config, topology, name
        self._compiled[key] = self._pool.submit(*args)
      futures.append(self._compiled[key])
    return _make_plan(config, topology, [x.result() for x in futures])


def relevant_settings(config: Config, name: str) -> dict[str, Any]:
  """The settings, without those that cannot change the program `name`."""
  values, part = config.to_dict(), programs.part_of(name)
  model, rollout = values["model"], values["rollout"]
  if not programs.reads_pixels(config, name):
    model["image_size"] = None
  if part != "update":
    values["train"] = model["remat"] = None
  if part != "pictures":
    rollout["pictures_per_shard"] = None
  if part != "rollout":
    rollout["prompts_at_a_time"] = None
  if part == "evaluation":
    values["data"]["prompts_per_step"] = None
  else:
    values["eval"] = None
  return values


def compile_program(
  config: Config, topology: Topology, name: str
) -> dict[str, Any]:
  """Compiles one program in a process of its own.

  Raises:
    RuntimeError: The process failed; the message ends with its output.
  """
  context = multiprocessing.get_context("forkserver")
  # The server imports this module once for all of its processes.
  context.set_forkserver_preload([__name__])
  with tempfile.TemporaryDirectory(prefix="grpo_tpu_plan_") as temporary:
    folder = pathlib.Path(temporary)
    args = config.to_dict(), str(topology), name, folder
    process = context.Process(target=_run_worker, args=args, daemon=True)
    # The server would answer Ctrl-C by a traceback. Starting the tracker of
    # resources unblocks it, so that comes first.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    process.join()
    answer, output = folder / _ANSWER, folder / _OUTPUT
    if not answer.exists():
      reason = output.read_text()[-4000:] if output.exists() else ""
      raise RuntimeError(
        f"{name} could not be compiled for {topology} "
        f"(exit code {process.exitcode}):\n{reason}"
      )
    logging.info("Compiled %s for %s.", name, topology)
    return json.loads(answer.read_text())


def _run_worker(
  values: dict[str, Any], topology: str, name: str, folder: pathlib.Path
) -> None:
  """Compiles a program in this process and ends the process.

  Writes the results into `_ANSWER` and all messages, of the compiler too, into
  `_OUTPUT`. Without an answer the messages hold the error.
  """
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
  output = os.open(folder / _OUTPUT, os.O_WRONLY | os.O_CREAT)
  for stream in (1, 2):
    os.dup2(output, stream)
  os.environ.update(aot.ENVIRONMENT | {"TMPDIR": str(folder)})
  jax.config.update("jax_platforms", aot.ENVIRONMENT["JAX_PLATFORMS"])
  try:
    config = Config.from_config_dict(values)
    described = hardware.parse_topology(topology)
    answer = _measure(config, described, name, folder / "dump")
    (folder / _ANSWER).write_text(json.dumps(answer))
  except BaseException:
    traceback.print_exc()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(0)  # The compiler's thread is still running.


def _measure(
  config: Config, topology: Topology, name: str, folder: pathlib.Path
) -> dict[str, Any]:
  """Traces and compiles a program; returns its needs."""
  mesh = programs.described_mesh(config, topology)
  program = programs.find(config, mesh, name)
  traced = program.trace(mesh)
  answer = {
    "name": program.name,
    "flops": flops.count_jaxpr(traced.jaxpr, while_trips=program.while_trips),
    "bytes_by_class": program.bytes_by_class(),
    "kept_bytes": arrays.device_bytes(program.kept),
    "rest_bytes": program.rest_bytes(traced.out_info, mesh),
    "completion_tokens": program.tokens,
  }
  hbm_bytes, collectives = aot.compile_buffers(traced.lower(), folder)
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return answer | {
    "hbm_bytes": hbm_bytes,
    "collectives": [dataclasses.asdict(x) for x in collectives],
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
  }


def _make_plan(
  config: Config, topology: Topology, answers: list[dict[str, Any]]
) -> Plan:
  """Adds the resident arrays and the bounds to the compiled programs."""
  resident = programs.resident_bytes(config)
  rows = []
  for answer in answers:
    name, by_class = answer["name"], answer["bytes_by_class"]
    hbm_bytes = answer["hbm_bytes"]
    beside = answer["kept_bytes"] + sum(
      max(0, size - by_class.get(kind, 0)) for kind, size in resident.items()
    )
    temporaries = max(0, hbm_bytes - sum(by_class.values()))
    device_flops = answer["flops"] / topology.num_devices
    least_bytes = roofline.least_hbm_bytes(config, name) + answer["rest_bytes"]
    sent = roofline.sent_bytes(config, topology, name)
    chip = topology.chip
    bounds = roofline.bounds_seconds(chip, device_flops, least_bytes, sent)
    rows.append(
      {
        "name": name,
        "hbm_bytes": hbm_bytes,
        "hbm_limit_bytes": topology.chip.hbm_limit_bytes,
        "resident_bytes": hbm_bytes + beside,
        "bytes_by_class": by_class | {"temporaries": temporaries},
        "beside_bytes": beside,
        "flops": answer["flops"],
        "flops_per_device": device_flops,
        "least_hbm_traffic_bytes": least_bytes,
        "collective_bytes": sent,
        "defects": roofline.find_defects(config, answer["collectives"]),
        "bounds_seconds": bounds,
        "completion_tokens": answer["completion_tokens"],
        "cpu_seconds": answer["cpu_seconds"],
      }
    )
  return Plan(config, topology, rows, resident)
