"""A run with adapters leaves as a model, or as adapters, and is the same."""

import json
import pathlib
import subprocess

import numpy as np
import pytest

from configs import base
from grpo_tpu.checkpoint import export
from grpo_tpu.config import schema as run_config
from tests.grpo_tpu.models.gemma3 import one_device, whole_rows

pytestmark = [pytest.mark.e2e, pytest.mark.peers]
SCRIPT = pathlib.Path(__file__).parents[1] / "peers" / "gemma3_transformers.py"
RANK = 4


def exported(workdir, weights, **settings):
  """What --mode=export makes of a workdir, on this process's devices."""
  values = base.get_config().to_dict()
  values["mesh"]["fsdp"] = 8
  values["model"]["weights"] = weights
  values["export"] |= settings | {"dtype": "float32"}
  config = run_config.Config.from_config_dict(values)
  export.check(config.model, config.export, str(workdir))
  export.run(config.model, config.export, config.mesh, str(workdir))
  return workdir / "export"


def inputs():
  """A row with two pictures, one with one and one of text, padded."""
  rng = np.random.default_rng(0)
  start, tokens = 109, np.zeros((3, 14), np.int32)
  tokens[0] = [2, start, 130, start, *rng.integers(111, 1024, 10)]
  tokens[1, :10] = [2, 140, start, *rng.integers(111, 1024, 7)]
  tokens[2, :9] = [2, *rng.integers(111, 1024, 8)]
  images = rng.integers(0, 256, (3, 2, 48, 48, 3), dtype=np.uint8)
  return {"tokens": tokens, "images": images, "num_images": np.array([2, 1, 0])}


@pytest.fixture(scope="module")
def folder(peers_python, new_run, tmp_path_factory):
  """Logits of the start, of the merged run, and of the start with adapters."""
  folder = tmp_path_factory.mktemp("exported")
  exported(folder, "random:0").rename(folder / "start")
  run = new_run(
    f"--config.model.weights=hf:{folder}/start",
    f"--config.model.lora.rank={RANK}",
    "--config.model.train_vision=False",
    "--config.train.num_steps=2",
    "--config.optimizer.learning_rate=3e-2",
    "--config.eval.every_steps=2",
  ).start()
  trained = f"run:{run.workdir}"
  exported(run.workdir, trained).rename(folder / "merged")
  exported(run.workdir, trained, adapter=True).rename(folder / "adapter")
  np.savez(folder / "inputs.npz", **inputs())
  for command in (
    ("answer", folder, "start", "merged"),
    ("adapt", folder, "start", "adapter"),
  ):
    subprocess.run([peers_python, SCRIPT, *command], check=True)
  return folder


def test_the_merged_model_and_the_start_with_adapters_are_the_trained_one(
  folder,
):
  given = inputs()
  config, params = one_device.from_hf(folder / "merged")
  ours = whole_rows.logits(config, params, given["tokens"], given["images"])
  is_real = given["tokens"] != 0
  logits = {
    name: np.load(folder / f"{name}.npz")["logits"][is_real]
    for name in ("start", "merged", "adapter")
  }
  np.testing.assert_allclose(logits["merged"], ours[is_real], atol=1e-4)
  np.testing.assert_allclose(logits["adapter"], ours[is_real], atol=1e-4)
  # Far from where it began: two steps have moved it.
  assert np.abs(logits["merged"] - logits["start"]).max() > 0.1


def test_adapters_say_what_they_belong_to_and_are_small(folder):
  settings = json.loads(
    (folder / "adapter" / "adapter_config.json").read_text()
  )
  assert settings["r"] == RANK
  assert settings["base_model_name_or_path"] == str(folder / "start")
  size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
  whole = (folder / "merged" / "model.safetensors").stat().st_size
  assert size < whole / 4
