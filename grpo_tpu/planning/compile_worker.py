"""A process that compiles one program of a run and writes down its needs."""

import dataclasses
import json
import os
import pathlib
import resource
import sys
import traceback
from typing import Any

import jax

from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import hardware
from grpo_tpu.planning import aot, flops, programs

ANSWER, OUTPUT = "answer.json", "output.txt"


def run(
  values: dict[str, Any], topology: str, name: str, folder: pathlib.Path
) -> None:
  """Compiles a program and ends the process; does not return.

  Writes the results into `ANSWER` and all messages, of the compiler too, into
  `OUTPUT`. Without an answer the messages hold the error.

  Args:
    values: The run's settings.
    topology: The slice, as `hardware.parse_topology` reads it.
    name: One of `programs.names`.
    folder: An empty folder.
  """
  output = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT)
  for stream in (1, 2):
    os.dup2(output, stream)
  os.environ.update(aot.ENVIRONMENT | {"TMPDIR": str(folder)})
  jax.config.update("jax_platforms", aot.ENVIRONMENT["JAX_PLATFORMS"])
  try:
    config = run_config.Config.from_config_dict(values)
    described = hardware.parse_topology(topology)
    answer = _compile(config, described, name, folder / "dump")
    (folder / ANSWER).write_text(json.dumps(answer))
  except BaseException:
    traceback.print_exc()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(0)  # The compiler's thread is still running.


def _compile(
  config: run_config.Config,
  topology: hardware.Topology,
  name: str,
  folder: pathlib.Path,
) -> dict[str, Any]:
  mesh = programs.described_mesh(config, topology)
  program = programs.find(config, mesh, name)
  traced = program.trace(mesh)
  answer = {
    "name": program.name,
    "flops": flops.count_jaxpr(traced.jaxpr, while_trips=program.while_trips),
    "bytes_by_class": program.bytes_by_class(),
    "kept_bytes": programs.device_bytes(program.kept),
    "rest_bytes": program.rest_bytes(traced.out_info, mesh),
    "completion_tokens": program.tokens,
  }
  compiled = aot.compile_buffers(traced.lower(), folder)
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return answer | {
    "hbm_bytes": compiled.hbm_bytes,
    "collectives": [dataclasses.asdict(x) for x in compiled.collectives],
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
  }
