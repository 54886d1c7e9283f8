"""What a process of its own finds out about one program of a run."""

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


def answer(
  values: dict[str, Any], topology: str, program: str, folder: pathlib.Path
) -> None:
  """What a process does that is started for one program; it does not return.

  Writes `answer.json` into the folder, or the reason why there is none into
  `said.txt`, with all that the compiler says.

  Args:
    values: The run's settings.
    topology: As `chips.parse` reads it.
    program: Of `programs.names`.
    folder: There, and empty.
  """
  said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT)
  for stream in (1, 2):
    os.dup2(said, stream)
  os.environ.update(aot.ENVIRONMENT | {"TMPDIR": str(folder)})
  jax.config.update("jax_platforms", aot.ENVIRONMENT["JAX_PLATFORMS"])
  try:
    config = run_config.Config.from_config_dict(values)
    found = _found(
      config, hardware.parse_topology(topology), program, folder / "dump"
    )
    (folder / "answer.json").write_text(json.dumps(found))
  except BaseException:
    traceback.print_exc()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(0)  # The compiler is still at work.


def _found(
  config: run_config.Config,
  topology: hardware.Topology,
  name: str,
  folder: pathlib.Path,
) -> dict[str, Any]:
  mesh = programs.described_mesh(config, topology)
  program = programs.find(config, mesh, name)
  traced = program.traced(mesh)
  found = {
    "name": program.name,
    "flops": flops.count_jaxpr(traced.jaxpr, while_trips=program.while_trips),
    "bytes_by_class": program.bytes_by_class(),
    "kept_bytes": programs.device_bytes(program.kept),
    "rest_bytes": program.rest_bytes(traced.out_info, mesh),
    "completion_tokens": program.tokens,
  }
  compiled = aot.compile_buffers(traced.lower(), folder)
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return found | {
    "hbm_bytes": compiled.hbm_bytes,
    "collectives": [dataclasses.asdict(x) for x in compiled.collectives],
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
  }
