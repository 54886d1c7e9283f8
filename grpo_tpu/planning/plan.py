"""The mode "plan": says whether a run fits on a slice before it is booked.

Prints a table and writes `plan.json`. With advice, it first looks for the
largest step that fits.
"""

import json
import pathlib
import sys

from data_pipelines import validation
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import hardware
from grpo_tpu.planning import advise as advice
from grpo_tpu.planning import changes, planner, programs

_GIB = 2**30
_CLASSES = (
  *("params", "optimizer", "reference", "caches", "batch"),
  "temporaries",
)
_MEMORY_HEADS = (*_CLASSES, "other", "total", "free")
_WORK_HEADS = (
  *("TFLOP", "HBM GB", "sent GB", "compute s", "HBM s", "ICI s", "DCN s"),
  "bound by",
)


def run(
  config: run_config.Config, workdir: str, topology: str | None, *, advise: bool
) -> None:
  """Plans, writes `plan.json`, and prints the table.

  Args:
    config: The run's settings.
    workdir: The folder for `plan.json`.
    topology: The slice, as `hardware.parse_topology` reads it.
    advise: Look for the largest step that fits, and plan that.

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
    _print(f"{found}\n")
    plan = found.plan
  else:
    name = "parameters, optimizer and reference"
    size = sum(programs.resident_bytes(config).values())
    _check_room(config, described, compiler, name, size)
    plan = compiler.plan(config, described)
  path = pathlib.Path(workdir) / "plan.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(plan.to_dict(), indent=2) + "\n")
  _print(table(plan))
  name, size = plan.peak["name"], plan.peak["resident_bytes"]
  _check_room(plan.config, described, compiler, name, size)


def table(plan: planner.Plan) -> str:
  """The printed report: memory, work and bounds, one line per program."""
  config, topology = plan.config, plan.topology
  limit = topology.chip.hbm_limit_bytes
  lines = [
    f"{config.model.name} on {topology} ({topology.num_chips} chips,"
    f" {topology.slice_name}), mesh {config.mesh.replica} x "
    f"{config.mesh.fsdp} x {config.mesh.tensor}",
    "",
    "HBM of a device, GiB            "
    + "".join(f"{h:>12}" for h in _MEMORY_HEADS),
  ]
  for row in plan.programs:
    by_class, total = row["bytes_by_class"], row["resident_bytes"]
    sizes = [by_class.get(name, 0) for name in _CLASSES]
    sizes += [row["beside_bytes"], total, limit - total]
    lines.append(
      f"{row['name']:<32}" + "".join(f"{x / _GIB:>12.2f}" for x in sizes)
    )
  lines += [
    "",
    "Work and bounds of a call       "
    + "".join(f"{h:>11}" for h in _WORK_HEADS),
  ]
  for row in plan.programs:
    bounds, sent = row["bounds_seconds"], row["collective_bytes"]
    cells = [f"{row['flops'] / 1e12:>11.1f}"]
    cells.append(f"{row['least_hbm_traffic_bytes'] / 1e9:>11.1f}")
    cells.append(f"{(sent['ici'] + sent['dcn']) / 1e9:>11.2f}")
    cells += [f"{bounds[k]:>11.4f}" for k in ("compute", "hbm", "ici", "dcn")]
    cells.append(f"{max(bounds, key=lambda k: bounds[k]):>11}")
    lines.append(f"{row['name']:<32}" + "".join(cells))
  for row in plan.programs:
    lines += [f"look at {row['name']}: {defect}" for defect in row["defects"]]
  for kind, bound in plan.step_bounds().items():
    lines += [
      "",
      f"bounds of a step of {kind}, which these programs cannot beat: "
      f"at least {bound['step_seconds_at_least']:.2f} s, at most "
      f"{bound['completion_tokens_per_second_at_most']:,.0f} completion "
      "tokens/s, at least "
      f"{bound['chip_hours_per_1000_steps_at_least']:,.1f} chip-hours for 1,000"
      " steps",
    ]
  verdict = "fits" if plan.fits() else "DOES NOT FIT"
  lines += [
    "",
    f"{verdict}: {plan.peak['name']} needs "
    f"{plan.peak['resident_bytes'] / _GIB:.2f} of {limit / _GIB:.2f} GiB, "
    f"{plan.room:.1%} free",
  ]
  return "\n".join(lines)


def _check_room(
  config: run_config.Config,
  topology: hardware.Topology,
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


def _print(text: str) -> None:
  sys.stdout.write(text + "\n")
  sys.stdout.flush()
