"""The mode "plan": says whether a run fits on a slice before it is booked."""

import json

import jinja2

from data_pipelines import validation
from data_pipelines.storage import paths
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import hardware
from grpo_tpu.distributed.hardware import Topology
from grpo_tpu.planning import advise as advice
from grpo_tpu.planning import changes, planner, programs

_GIB = 2**30


def run(
  config: Config, workdir: str, topology: str | None, *, advise: bool
) -> None:
  """Plans the run, or with `advise` the largest step that fits.

  Prints a table and writes `plan.json` into `workdir`.

  Raises:
    SettingError: The slice does not exist, the mesh does not cover it, or the
      run does not fit; the message names the nearest that would work.
  """
  with validation.user_errors():
    if topology is None:
      raise ValueError(
        "--topology must name a slice for --mode=plan; set --topology=v5e:4x4."
      )
    described = hardware.parse_topology(topology)
    if not advise:
      changes.check_mesh(config, described)
    planner.check_compiler()
  compiler = planner.Compiler()
  if advise:
    found = advice.advise(config, described, compiler)
    print(f"{found}\n", flush=True)
    plan = found.plan
  else:
    name = "parameters, optimizer and reference"
    size = sum(programs.resident_bytes(config).values())
    _check_room(config, described, compiler, name, size)
    plan = compiler.plan(config, described)
  text = json.dumps(plan.to_dict(), indent=2) + "\n"
  paths.write_whole(paths.make_folder(workdir) / "plan.json", text.encode())
  print(table(plan), flush=True)
  name, size = plan.peak["name"], plan.peak["resident_bytes"]
  _check_room(plan.config, described, compiler, name, size)


def table(plan: planner.Plan) -> str:
  """The printed report: memory, work and bounds, one line per program."""
  pages = jinja2.Environment(
    loader=jinja2.PackageLoader("grpo_tpu.planning"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  return pages.get_template("table.txt.j2").render(plan=plan, gib=_GIB)


def _check_room(
  config: Config,
  topology: Topology,
  compiler: planner.Compiler,
  name: str,
  size: int,
) -> None:
  """Raises a SettingError if `size` bytes do not fit; names what would fit."""
  limit, chip = topology.chip.hbm_limit_bytes, topology.chip.name
  if size <= limit:
    return
  reason = (
    f"--topology ({topology}) must have room for {name}: "
    f"{size / _GIB:.2f} GiB of the {limit / _GIB:.2f} that a device has"
  )
  nearest = advice.nearest_that_fits(config, topology, compiler)
  if nearest is None:
    raise validation.SettingError(
      f"{reason}. No slice of {chip} has room with these settings; choose a "
      "smaller model.name, or set model.lora.rank=16."
    )
  new, larger = nearest
  raise validation.SettingError(
    f"{reason}; it fits with --topology={larger} {changes.format_flags(new)}"
  )
