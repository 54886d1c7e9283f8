"""Reward models from transformers and peft, and back."""

import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.models import network, scores
from grpo_tpu.models.gemma3 import lora
from grpo_tpu.models.gemma3.convert import huggingface, peft
from grpo_tpu.models.settings import LoraConfig
from tests.grpo_tpu.models.gemma3 import one_device, whole_rows

pytestmark = pytest.mark.peers
SCRIPT = pathlib.Path(__file__).parents[2] / "peers" / "gemma3_scores.py"
CLASSES = {
  "image": "Gemma3ForSequenceClassification",
  "text": "Gemma3TextForSequenceClassification",
}
# Of the last tokens of the three rows, so many are the completion.
COMPLETIONS = (5, 0, 7)
LORA = LoraConfig(3, 5.0, ("q", "kv"), init="")


def transformers(python, *arguments):
  subprocess.run([python, str(SCRIPT), *map(str, arguments)], check=True)


def with_random_adapters(config, params):
  """Adapters that matter, and another head."""
  rng = np.random.default_rng(0)
  adapters = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32),
    lora.abstract_adapters(config, LORA),
  )
  return adapters, lora.with_adapters(params, adapters, LORA)


@pytest.fixture(scope="module")
def saved(peers_python, tmp_path_factory):
  """Reward models that transformers saved, and its scores of ours."""
  folder = tmp_path_factory.mktemp("scores")
  transformers(peers_python, "make", folder)
  ours = []
  for name in CLASSES:
    config, params = one_device.from_hf(folder / name)
    huggingface.save(config, params, folder / f"{name}_ours")
    adapters, _ = with_random_adapters(config, params)
    peft.save(config, LORA, adapters, folder / f"{name}_our_adapter")
    ours += f"{name}_ours", f"{name}+{name}_our_adapter"
  transformers(peers_python, "score", folder, *ours)
  return folder


def our_scores(folder, config, params):
  """Each row as a prompt and a completion."""
  given = np.load(folder / "inputs.npz")
  tokens, images = given["tokens"], given["images"]
  if config.vision is None:
    images = np.zeros((len(tokens), 0, 1, 1, 3), np.uint8)
  ids, length, _ = whole_rows._expand_images(config, tokens, images.shape[1])
  completions = np.zeros((len(ids), 1, max(COMPLETIONS)), np.int32)
  for row, count in enumerate(COMPLETIONS):
    end = int(length[row])
    completions[row, 0, :count] = ids[row, end - count : end]
  taken = np.array(COMPLETIONS)
  forward = network.ForwardConfig(
    config=config,
    dtype=jnp.float32,
    remat="none",
    temperature=1.0,
    chunk_size=8,
    train_vision=False,
  )
  return jax.jit(scores.scores, static_argnums=0)(
    *(forward, params, jnp.asarray(ids), jnp.asarray(length - taken)),
    *(jnp.asarray(images), jnp.asarray(completions)),
    jnp.asarray(np.arange(completions.shape[2]) < taken[:, None, None]),
  )


@pytest.mark.parametrize("name", CLASSES)
def test_scores_are_those_of_transformers_whichever_side_is_padded(saved, name):
  config, params = one_device.from_hf(saved / name)
  ours = our_scores(saved, config, params)
  with np.load(saved / f"{name}.npz") as theirs:
    assert np.ptp(theirs["right"]) > 0.1
    for side in ("right", "left"):
      np.testing.assert_allclose(ours, theirs[side], atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_gives_our_export_the_same_scores(saved, name):
  with np.load(saved / f"{name}.npz") as theirs:
    again = np.load(saved / f"{name}_ours.npz")
    np.testing.assert_array_equal(again["right"], theirs["right"])
  folder = saved / f"{name}_ours"
  config = json.loads((folder / "config.json").read_text())
  assert config["architectures"] == [CLASSES[name]]
  assert not (folder / "generation_config.json").exists()


@pytest.mark.parametrize("name", CLASSES)
def test_adapters_and_head_of_peft_score_as_they_do_there(saved, name):
  config, params = one_device.from_hf(saved / name)
  settings = LoraConfig(3, 5.0, LORA.targets, f"peft:{saved}/{name}_adapter")
  drawn = lora.initial_adapters(config, settings, 0)
  adapters = peft.load(config, settings, drawn)
  adapted = lora.with_adapters(params, adapters, settings)
  with np.load(saved / f"{name}_adapted.npz") as theirs:
    ours = our_scores(saved, config, adapted)
    np.testing.assert_allclose(ours, theirs["right"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_peft_gives_our_adapters_and_head_the_same_scores(saved, name):
  config, params = one_device.from_hf(saved / name)
  _, adapted = with_random_adapters(config, params)
  with np.load(saved / f"{name}_our_adapter.npz") as theirs:
    ours = our_scores(saved, config, adapted)
    np.testing.assert_allclose(ours, theirs["right"], rtol=1e-5, atol=1e-4)
