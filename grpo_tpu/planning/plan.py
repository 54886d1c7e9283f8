"""The mode "plan": does a run fit on a slice that is not booked yet?

Prints a table and writes `plan.json`; or, asked for advice, prints the settings
of the largest step that fits.
"""

import json
import pathlib
import sys

from data_pipelines import validation
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import hardware
from grpo_tpu.planning import advise as advice
from grpo_tpu.planning import planner

_GIB = 2**30


def run(
  config: run_config.Config, workdir: str, topology: str | None, *, advise: bool
) -> None:
  """Plans, writes `plan.json`, and prints the table.

  Args:
    config: The run's settings.
    workdir: Where `plan.json` goes.
    topology: As `chips.parse` reads it.
    advise: Look for the largest step that fits, and plan that.

  Raises:
    SettingError: No such slice, a mesh that does not fit it, or a run that does
      not; the message has the nearest that would.
  """
  with validation.user_errors():
    described = planner.parsed(topology)
    if not advise:
      planner.check(config, described)
    planner.check_compiler()
  compiler = planner.Compiler()
  if advise:
    found = advice.advise(config, described, compiler)
    _say(f"{found}\n")
    made = found.made
  else:
    _check_room(config, described, compiler)
    made = compiler.plan(config, described)
  path = pathlib.Path(workdir) / "plan.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(made.to_dict(), indent=2) + "\n")
  _say(table(made))
  if not made.fits():
    row = made.peak
    what, size = row["name"], row["resident_bytes"]
    raise validation.SettingError(_refusal(made, compiler, what, size))


def table(made: planner.Plan) -> str:
  """What people read: memory, work and bounds, a line for each program."""
  limit = made.topology.chip.hbm_limit_bytes
  config = made.config
  lines = [
    f"{config.model.name} on {made.topology} ({made.topology.num_chips} chips,"
    f" {made.topology.slice_name}), mesh {config.mesh.replica} x "
    f"{config.mesh.fsdp} x {config.mesh.tensor}",
    "",
    "HBM of a device, GiB            " + "".join(f"{h:>12}" for h in _HEADS),
  ]
  for row in made.programs:
    by_class = row["bytes_by_class"]
    cells = [by_class.get(name, 0) / _GIB for name in _CLASSES]
    cells += [row["beside_bytes"] / _GIB, row["resident_bytes"] / _GIB]
    cells.append((limit - row["resident_bytes"]) / _GIB)
    lines.append(f"{row['name']:<32}" + "".join(f"{x:>12.2f}" for x in cells))
  lines += [
    "",
    "Work and bounds of a call       "
    + "".join(f"{h:>11}" for h in _WORK_HEADS),
  ]
  for row in made.programs:
    bounds = row["bounds_seconds"]
    cells = [f"{row['flops'] / 1e12:>11.1f}"]
    cells.append(f"{row['least_hbm_traffic_bytes'] / 1e9:>11.1f}")
    moved = row["collective_bytes"]
    cells.append(f"{(moved['ici'] + moved['dcn']) / 1e9:>11.2f}")
    cells += [f"{bounds[k]:>11.4f}" for k in ("compute", "hbm", "ici", "dcn")]
    cells.append(f"{max(bounds, key=lambda k: bounds[k]):>11}")
    lines.append(f"{row['name']:<32}" + "".join(cells))
  for row in made.programs:
    for defect in row["defects"]:
      lines.append(f"look at {row['name']}: {defect}")
  for kind, bound in planner.step_bounds(made).items():
    lines += [
      "",
      f"bounds of a step of {kind}, which these programs cannot beat: "
      f"at least {bound['step_seconds_at_least']:.2f} s, at most "
      f"{bound['completion_tokens_per_second_at_most']:,.0f} completion "
      "tokens/s, at least "
      f"{bound['chip_hours_per_1000_steps_at_least']:,.1f} chip-hours for 1,000"
      " steps",
    ]
  verdict = "fits" if made.fits() else "DOES NOT FIT"
  lines += [
    "",
    f"{verdict}: {made.peak['name']} needs "
    f"{made.peak['resident_bytes'] / _GIB:.2f} of {limit / _GIB:.2f} GiB, "
    f"{made.room:.1%} free",
  ]
  return "\n".join(lines)


_CLASSES = (
  *("params", "optimizer", "reference", "caches", "batch"),
  "temporaries",
)
_HEADS = (*_CLASSES, "beside it", "together", "room")
_WORK_HEADS = (
  *("TFLOP", "HBM GB", "moved GB", "compute s", "HBM s", "ICI s", "DCN s"),
  "bound by",
)


def _check_room(
  config: run_config.Config,
  topology: hardware.Topology,
  compiler: planner.Compiler,
) -> None:
  """Whether there is room for what no program can do without."""
  made = planner.nothing_compiled(config, topology)
  if made.least_bytes > topology.chip.hbm_limit_bytes:
    what = "parameters, optimizer and reference"
    raise validation.SettingError(
      _refusal(made, compiler, what, made.least_bytes)
    )


def _refusal(
  made: planner.Plan, compiler: planner.Compiler, what: str, size: int
) -> str:
  """Why, and the nearest that would: fewer rows at a time, or more chips."""
  limit, chip = made.topology.chip.hbm_limit_bytes, made.topology.chip.name
  reason = (
    f"--topology ({made.topology}) must have room for {what}: "
    f"{size / _GIB:.2f} GiB of the {limit / _GIB:.2f} that a device has"
  )
  nearest = advice.nearest_that_fits(made, compiler)
  if nearest is None:
    return (
      f"{reason}. No slice of {chip} has room with these settings; choose a "
      "smaller model.name, or set model.lora.rank=16."
    )
  changes, topology = nearest
  return f"{reason}; it fits with --topology={topology} {advice.flags(changes)}"


def _say(text: str) -> None:
  """To standard output, which is what the mode is for."""
  sys.stdout.write(text + "\n")
  sys.stdout.flush()
