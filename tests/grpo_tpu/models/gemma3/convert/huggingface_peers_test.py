"""Weights from Hugging Face and back, compared with transformers."""

import pathlib
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors

from grpo_tpu.models.gemma3 import lora
from grpo_tpu.models.gemma3.convert import huggingface, peft
from grpo_tpu.models.settings import LORA_TARGETS, LoraConfig
from tests.grpo_tpu.models.gemma3 import one_device, whole_rows

pytestmark = pytest.mark.peers
SCRIPT = pathlib.Path(__file__).parents[4] / "peers" / "gemma3_transformers.py"


def transformers(python, *arguments):
  subprocess.run([python, str(SCRIPT), *map(str, arguments)], check=True)


@pytest.fixture(scope="module")
def saved(peers_python, tmp_path_factory):
  """Checkpoints that transformers saved, and its results on ours."""
  folder = tmp_path_factory.mktemp("transformers")
  transformers(peers_python, "make", folder)
  for name in ("image", "text"):
    config, params = one_device.from_hf(folder / name)
    huggingface.save(config, params, folder / f"{name}_ours")
    huggingface.save(
      config, params, folder / f"{name}_bf16", dtype=jnp.bfloat16
    )
  ours = [f"{x}_{y}" for x in ("image", "text") for y in ("ours", "bf16")]
  transformers(peers_python, "answer", folder, *ours)
  return folder


def inputs(folder, name):
  given = np.load(folder / "inputs.npz")
  images = given["images"] if name == "image" else None
  return given["tokens"], images


@pytest.mark.parametrize("name", ["image", "text"])
def test_logits_equal_those_of_transformers(saved, name):
  """Two images, one and none in a batch of different lengths, in fp32."""
  tokens, images = inputs(saved, name)
  config, params = one_device.from_hf(saved / name)
  actual = whole_rows.logits(config, params, tokens, images)
  expected = np.load(saved / f"{name}.npz")["logits"]
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(
    actual[tokens != 0], expected[tokens != 0], atol=1e-4
  )


@pytest.mark.parametrize("name", ["image", "text"])
def test_transformers_gives_our_export_the_same_logits(saved, name):
  tokens, _ = inputs(saved, name)
  expected = np.load(saved / f"{name}.npz")["logits"]
  again = np.load(saved / f"{name}_ours.npz")
  assert again["dtype"] == "float32"
  np.testing.assert_array_equal(
    again["logits"][tokens != 0], expected[tokens != 0]
  )
  assert np.load(saved / f"{name}_bf16.npz")["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["image", "text"])
def test_every_tensor_survives_the_round_trip(saved, name):
  theirs = safetensors.load_file(saved / name / "model.safetensors")
  ours = safetensors.load_file(saved / f"{name}_ours" / "model.safetensors")
  # Released checkpoints have a name there that transformers 5 leaves out.
  ours = {k.replace("vision_model.", ""): v for k, v in ours.items()}
  assert ours.keys() == theirs.keys()
  for key, value in theirs.items():
    np.testing.assert_array_equal(ours[key], value, err_msg=key)


@pytest.mark.parametrize(
  "name, targets", [("image", LORA_TARGETS), ("text", ("q", "kv"))]
)
def test_an_adapter_that_peft_made_acts_as_it_does_there(saved, name, targets):
  """The text model's has queries and values alone: keys get a zero product."""
  tokens, images = inputs(saved, name)
  config, params = one_device.from_hf(saved / name)
  settings = LoraConfig(3, 5.0, targets, init=f"peft:{saved}/{name}_adapter")
  drawn = lora.initial_adapters(config, settings, 0)
  adapters = peft.load(config, settings, drawn)
  adapted = lora.with_adapters(params, adapters, settings)
  actual = whole_rows.logits(config, adapted, tokens, images)[tokens != 0]
  there = np.load(saved / f"{name}_adapted.npz")["logits"][tokens != 0]
  np.testing.assert_allclose(actual, there, rtol=1e-5, atol=1e-5)
  alone = np.load(saved / f"{name}.npz")["logits"][tokens != 0]
  assert np.abs(there - alone).max() > 0.1
  with pytest.raises(
    ValueError, match=r"set model.lora.rank=3 and model.lora.alpha=5.0\."
  ):
    peft.check(config, LoraConfig(4, 1.0, targets, init=settings.init))
