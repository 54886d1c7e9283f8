"""Plans for described slices; no test needs a TPU."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import unittest.mock

import pytest

from data_pipelines import validation
from grpo_tpu.distributed import hardware
from grpo_tpu.planning import aot, plan, planner
from tests.grpo_tpu.planning.planning_cases import (
  ROOT,
  config_of,
  config_of_4b,
)

TOPOLOGIES = {
  "gemma3_4b_v5e_8": "v5e:2x4",
  "gemma3_4b_v5e_16": "v5e:4x4",
  "gemma3_4b_v6e_16": "v6e:4x4",
  "gemma3_4b_v5p_16": "v5p:2x2x2",
  "gemma3_12b_v5p_64": "v5p:2x4x4",
  "gemma3_27b_v5p_256": "v5p:4x4x8",
  "gemma3_27b_v6e_256": "v6e:16x16",
}


MARGIN = 0.1


@pytest.fixture
def libtpu():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("no libtpu for this machine")


def test_a_missing_compiler_is_an_error_with_a_remedy(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"libtpu.*pip install.*macOS"):
    planner.check_compiler()


def test_a_plan_asks_for_the_compiler_before_it_compiles(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  config = config_of_4b()
  with pytest.raises(validation.SettingError, match="needs libtpu"):
    plan.run(config, str(tmp_path), "v5e:4x4", advise=False)


@pytest.mark.parametrize("gibibytes, verdict", [(10, "fits"), (20, "DOES NOT")])
def test_the_table_says_how_much_room_there_is(gibibytes, verdict):
  config = config_of_4b()
  row = {
    "name": "train_step (text)",
    "bytes_by_class": {"params": 2**30, "temporaries": 2**31},
    "beside_bytes": 2**30,
    "resident_bytes": gibibytes * 2**30,
    "flops": 2e12,
    "least_hbm_traffic_bytes": 3e9,
    "collective_bytes": {"ici": 4e9, "dcn": 0.0},
    "bounds_seconds": {"compute": 1.0, "hbm": 0.5, "ici": 0.25, "dcn": 0.0},
    "completion_tokens": 7,
    "defects": ["something odd"],
  }
  made = planner.Plan(config, hardware.parse_topology("v5e:4x4"), [row], {})
  lines = plan.table(made).splitlines()
  memory, work = (x.split()[2:] for x in lines if x.startswith("train_step"))
  room = f"{15.75 - gibibytes:.2f}"
  assert memory == [
    *("1.00", "0.00", "0.00", "0.00", "0.00", "2.00", "1.00"),
    *(f"{gibibytes}.00", room),
  ]
  assert work[:3] == ["2.0", "3.0", "4.00"] and work[-1] == "compute"
  assert "look at train_step (text): something odd" in lines
  assert lines[-1].startswith(verdict)


def test_the_table_has_masters_beside_parameters_if_a_run_has_them():
  row = {
    "name": "train_step (text)",
    "bytes_by_class": {"params": 2**30, "masters": 2**31},
    "beside_bytes": 0,
    "resident_bytes": 2**32,
    "flops": 2e12,
    "least_hbm_traffic_bytes": 3e9,
    "collective_bytes": {"ici": 4e9, "dcn": 0.0},
    "bounds_seconds": {"compute": 1.0, "hbm": 0.5, "ici": 0.25, "dcn": 0.0},
    "completion_tokens": 7,
    "defects": [],
  }
  topology = hardware.parse_topology("v5e:4x4")
  made = planner.Plan(config_of_4b(), topology, [row], {"masters": 2**31})
  lines = plan.table(made).splitlines()
  head = next(x for x in lines if x.startswith("HBM")).split()
  sizes = next(x for x in lines if x.startswith("train_step")).split()
  assert head[5:7] == ["params", "masters"]
  assert sizes[2:4] == ["1.00", "2.00"]


def test_a_plan_wants_a_topology(tmp_path):
  with pytest.raises(validation.SettingError, match="--topology.*v5e:4x4"):
    plan.run(config_of_4b(), str(tmp_path), None, advise=False)


def main_in_plan_mode(tmp_path, *flags):
  return subprocess.run(
    [
      *(sys.executable, "-m", "grpo_tpu.main", "--mode=plan"),
      f"--workdir={tmp_path}",
      *flags,
    ],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--topology=v5e:5x5"], "nearest is v5e:"),
    (["--topology=v5e:2x2"], "mesh.fsdp=4"),
    (
      ["--topology=v5e:2x2", "--config.mesh.tensor=3"],
      "a divisor of 1024: the nearest below is mesh.tensor=2",
    ),
  ],
  ids=["absurd", "mesh", "indivisible"],
)
def test_an_impossible_request_is_exit_64(tmp_path, flags, message):
  done = main_in_plan_mode(tmp_path, "--config=configs/smoke.py", *flags)
  assert done.returncode == 64
  assert message in done.stderr


@pytest.mark.aot
def test_the_smoke_config_is_planned(tmp_path, libtpu):
  done = main_in_plan_mode(
    tmp_path,
    "--config=configs/smoke.py",
    "--topology=v5e:2x2",
    "--config.mesh.fsdp=4",
  )
  assert done.returncode == 0, done.stderr
  made = json.loads((tmp_path / "plan.json").read_text())
  assert made["fits"]
  names = [row["name"] for row in made["programs"]]
  assert names == [
    *("pictures (image)", "prefill (text)", "prefill (image)", "decode_chunk"),
    *("results", "train_step (text)", "train_step (image)"),
    *("evaluation_prefill (image)", "evaluation_decode"),
  ]
  for row in made["programs"]:
    assert 0 < row["hbm_bytes"] < row["hbm_limit_bytes"]
    assert row["flops"] > 0 or row["name"] == "results"
    assert sum(row["bytes_by_class"].values()) >= row["hbm_bytes"]
  assert "fits: " in done.stdout


@pytest.mark.aot
@pytest.mark.nightly
def test_a_mixed_batch_is_compiled(libtpu):
  """Prompts of two images and of fewer, with the image tower trained."""
  changes = {"mesh.fsdp": 16, "data.images_per_prompt": 2}
  config, described = (
    config_of("smoke", **changes),
    hardware.parse_topology("v5e:4x4"),
  )
  found = {
    kind: planner.compile_program(config, described, f"train_step ({kind})")
    for kind in ("mixed", "image")
  }
  assert found["mixed"]["flops"] < found["image"]["flops"]
  assert found["mixed"]["hbm_bytes"] < 1.2 * found["image"]["hbm_bytes"]


@pytest.mark.aot
@pytest.mark.nightly
def test_learning_from_preferences_is_planned(tmp_path, libtpu):
  done = main_in_plan_mode(
    tmp_path,
    "--config=configs/preference.py",
    "--topology=v5e:2x2",
    "--config.mesh.fsdp=4",
  )
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / "plan.json").read_text())["programs"]
  (scored,) = [x for x in rows if x["name"] == "evaluation_score (image)"]
  assert scored["hbm_bytes"] > scored["bytes_by_class"]["reference"] > 0
  assert scored["flops"] > 0


@pytest.mark.aot
@pytest.mark.nightly
def test_a_config_that_does_not_fit_is_exit_64_with_one_that_does(
  tmp_path, libtpu
):
  """Activations of all prompts do not fit; those of a few do."""
  flags = [
    "--config=configs/smoke.py:warm_start",
    "--topology=v5e:1x1",
    "--config.data.prompts_per_step=16384",
    "--config.train.microbatch_bundles=16384",
    "--config.model.remat=none",
  ]
  done = main_in_plan_mode(tmp_path, *flags)
  assert done.returncode == 64, done.stderr
  assert "must have room for train_step (" in done.stderr
  remedy = done.stderr.partition("it fits with ")[2].splitlines()[0]
  again = main_in_plan_mode(tmp_path, *flags, *shlex.split(remedy))
  assert again.returncode == 0, again.stderr
  assert "\nfits: " in again.stdout


@pytest.mark.aot
@pytest.mark.nightly
def test_advice_for_the_smoke_config_fits_as_it_is_pasted(tmp_path, libtpu):
  flags = ["--config=configs/smoke.py", "--topology=v5e:2x2"]
  done = main_in_plan_mode(tmp_path, *flags, "--advise")
  assert done.returncode == 0, done.stderr
  advice_line = next(
    line for line in done.stdout.splitlines() if "--config." in line
  )
  made = json.loads((tmp_path / "plan.json").read_text())
  assert made["room"] >= MARGIN
  again = main_in_plan_mode(tmp_path, *flags, *shlex.split(advice_line))
  assert again.returncode == 0, again.stderr
  assert json.loads((tmp_path / "plan.json").read_text()) == made | {
    "programs": unittest.mock.ANY
  }


@pytest.mark.aot
@pytest.mark.nightly
@pytest.mark.parametrize("program", ["decode_chunk", "move"])
def test_memory_before_code_is_that_of_the_whole_compilation(libtpu, program):
  """Equal to the byte; the code takes some megabytes more.

  The peak in a whole compilation also counts other memories, so it may exceed
  the allocation.
  """
  name, topology = "gemma3_4b_v5e_16", "v5e:4x4"
  config, described = config_of(name), hardware.parse_topology(topology)
  quick = planner.compile_program(config, described, program)["hbm_bytes"]
  code = (
    "import json, sys\n"
    "from grpo_tpu.config import schema\n"
    "from grpo_tpu.distributed import hardware\n"
    "from grpo_tpu.planning import programs\n"
    "values, topology, name = json.load(sys.stdin)\n"
    "config = schema.Config.from_config_dict(values)\n"
    "topology = hardware.parse_topology(topology)\n"
    "mesh = programs.described_mesh(config, topology)\n"
    "traced = programs.find(config, mesh, name).trace(mesh)\n"
    "whole = traced.lower().compile().memory_analysis()\n"
    "code = whole.generated_code_size_in_bytes\n"
    "print(whole.total_allocation_bytes, code)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    input=json.dumps([config.to_dict(), topology, program]),
    cwd=ROOT,
    env=os.environ | aot.ENVIRONMENT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  allocated, code = map(int, done.stdout.split())
  assert quick == allocated
  assert quick == pytest.approx(allocated + code, rel=0.02)


@pytest.mark.aot
@pytest.mark.nightly
def test_moving_rows_takes_two_copies_and_no_more(libtpu):
  """One copy in the old grid and one in the new."""
  config, described = (
    config_of("gemma3_4b_v5e_16"),
    hardware.parse_topology("v5e:4x4"),
  )
  found = planner.compile_program(config, described, "move")
  assert found["hbm_bytes"] == pytest.approx(found["rest_bytes"], rel=0.02)


@pytest.mark.aot
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_an_overlay_fits_with_a_margin(libtpu, name, kind):
  """With rollout and training resident, and images of both sizes."""
  described = hardware.parse_topology(TOPOLOGIES[name])
  sizes = [config_of(name, kind, **{"model.image_size": x}) for x in (896, 448)]
  compiler = planner.Compiler()
  for config in sizes:
    made = compiler.plan(config, described)
    assert made.fits(MARGIN), (made.peak["name"], made.room)
