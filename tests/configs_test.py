"""Every config loads and holds; launch/smoke.sh draws what its config says."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from data_pipelines import dataset
from data_pipelines.sources import build
from data_pipelines.sources.drawn import synthetic
from grpo_tpu.config import schema as run_config
from grpo_tpu.config import sources as run_sources
from grpo_tpu.distributed import hardware
from grpo_tpu.planning import changes

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
OVERLAYS = [path for path in CONFIGS if path.stem.startswith("gemma3_")]
TOPOLOGIES = {
  "gemma3_4b_v5e_8": "v5e:2x4",
  "gemma3_4b_v5e_16": "v5e:4x4",
  "gemma3_4b_v6e_16": "v6e:4x4",
  "gemma3_4b_v5p_16": "v5p:2x2x2",
  "gemma3_12b_v5p_64": "v5p:2x4x4",
  "gemma3_27b_v5p_256": "v5p:4x4x8",
  "gemma3_27b_v6e_256": "v6e:16x16",
}
STAGES = ("warm_start", "grpo")
# Prints the words of the array that smoke.sh hands to prepare, one a line.
PREPARE_WORDS = r"""
seed=0 workdir=W
eval "$(sed -n '/^prepare=($/,/^)$/p' launch/smoke.sh)"
printf '%s\n' "${prepare[@]}"
"""
# In a process of its own, for absl's flags are one set to a process.
REQUEST_OF_FLAGS = """
import dataclasses, json, sys
from data_pipelines import prepare
prepare._define_flags()
prepare.FLAGS(sys.argv)
print(json.dumps(dataclasses.asdict(prepare._request())))
"""


def settings(path, *stage):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(*stage)


def validated(path, *stage):
  return run_config.Config.from_config_dict(settings(path, *stage))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid(path):
  config = validated(path)
  # The data section stands for a data set that can be asked for.
  assert isinstance(
    dataset.synthetic_request(config.data, 1024, "DIR").source, synthetic.Spec
  )


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_is_for_the_slice_in_its_name(path, kind):
  """Its mesh multiplies out to the chips, and every parameter divides."""
  config = validated(path, kind)
  model, size, *_ = path.stem.split("_")
  assert config.model.name == f"{model}_{size}"
  assert (config.lora is not None) == (kind == "lora")
  topology = hardware.parse_topology(TOPOLOGIES[path.stem])
  assert path.stem.endswith(topology.slice_name.replace("-", "_"))
  changes.check_mesh(config, topology)


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_trains_no_noise(path, tmp_path):
  """It asks for weights and data, with the commands; a plan needs neither."""
  config = validated(path)
  workdir, is_flag = str(tmp_path), lambda _: False
  with pytest.raises(ValueError) as caught:
    run_sources.resolve(config, "train", workdir, is_flag)
  size = config.model.name.removeprefix("gemma3_")
  assert f"hf download google/gemma-3-{size}-it " in str(caught.value)
  assert "\ndata.dir ('') must name the data" in str(caught.value)
  assert run_sources.resolve(config, "plan", workdir, is_flag) == config


def test_an_overlay_of_another_kind_is_refused():
  with pytest.raises(ValueError, match="kind.*'half'.*full or lora"):
    settings(OVERLAYS[0], "half")


def test_the_two_smoke_stages_read_the_same_prompts_with_the_same_model():
  warm_start, grpo = (
    validated(ROOT / "configs" / "smoke.py", stage) for stage in STAGES
  )
  assert (warm_start.data.kind, grpo.data.kind) == ("demonstrations", "online")
  assert warm_start.model == grpo.model
  shared = ("synthetic", "synthetic_eval_fraction", "prompt_buckets")
  for name in (*shared, "train_split", "eval_split"):
    assert getattr(warm_start.data, name) == getattr(grpo.data, name)
  # Held-out accuracy before and after is of the same problems.
  assert warm_start.eval.num_problems == grpo.eval.num_problems


def test_an_unknown_smoke_stage_is_refused():
  with pytest.raises(ValueError, match="stage.*'warmup'.*'warm_start'"):
    settings(ROOT / "configs" / "smoke.py", "warmup")


def test_the_smoke_script_draws_what_the_config_would():
  words = subprocess.run(
    ["bash", "-c", PREPARE_WORDS],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.splitlines()
  said = subprocess.run(
    [sys.executable, "-c", REQUEST_OF_FLAGS, *words],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  ).stdout
  config = validated(ROOT / "configs" / "smoke.py")
  wanted: build.Request = dataset.synthetic_request(
    config.data, config.model_inputs.vocab_size, "W/data"
  )
  assert json.loads(said) == json.loads(json.dumps(dataclasses.asdict(wanted)))
