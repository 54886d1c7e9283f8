"""Reward models against one sequence at a time, and those that are refused."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from data_pipelines import images, pipeline, prompt_rows
from data_pipelines.sources.drawn import synthetic
from data_pipelines.text import chat_prompts
from data_pipelines.text import tokenizer as tokens
from grpo_tpu.checkpoint import load, networks
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import text, weights
from grpo_tpu.models.gemma3.config import CONFIGS
from grpo_tpu.models.gemma3.convert import huggingface
from grpo_tpu.rewards import model
from grpo_tpu.rewards.networks import Completed

CONFIG = Config.from_config_dict(base.get_config())
POLICY = dataclasses.replace(
  CONFIG.model, weights="random:0", compute_dtype="float32"
)
SPEC = synthetic.Spec(
  num_problems=15,
  seed=0,
  difficulty=1,
  kinds=("bar_max", "color"),
  image_size=48,
  multi_choice_share=0.0,
  min_options=3,
  max_options=4,
)
LENGTHS = np.array([[3, 0], [5, 1]] * 8)
SHAPE = 128, 1  # Tokens and images of a prompt.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A reward model of the tiny size, with drawn weights, in Hugging Face's."""
  config = dataclasses.replace(CONFIGS["tiny"], has_score=True)
  params = weights.random_params(config, 7, jnp.float32)
  head = np.random.default_rng(1).normal(0, 0.1, params["score"]["w"].shape)
  params |= {"score": {"w": head.astype(np.float32)}}
  folder = tmp_path_factory.mktemp("reward_model")
  huggingface.save(config, params, folder)
  return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokens") / "tokenizer.model"
  words = [chat_prompts.chat_text(x) for x in synthetic.problems(SPEC)]
  tokens.train(words, path, 600)
  return tokens.Tokenizer(path)


@pytest.fixture(scope="module")
def prompts(tokenizer):
  """Fifteen prompts with a picture, and a row of padding."""
  vision = POLICY.network.vision
  builder = prompt_rows.RowBuilder(
    source=[*synthetic.problems(SPEC)],
    tokenizer=tokenizer,
    prompt_buckets=(128, 256),
    image_size=vision.shown_size,
    soft_tokens=vision.soft_tokens,
  )
  return pipeline.EvalBatches(builder, num_problems=15, batch_size=16)[0]


@pytest.fixture(scope="module")
def mesh():
  """Two devices, so that parameters and batches are really sharded."""
  return sharding.make_mesh(1, 2, 1, devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def completed(mesh):
  rng = np.random.default_rng(0)
  ids = rng.integers(110, 900, (*LENGTHS.shape, 5)).astype(np.int32)
  mask = np.arange(5) < LENGTHS[..., None]
  return Completed(
    *sharding.device_put_batch(mesh, (ids, mask)), [[""] * 2] * 16
  )


def opened(settings, mesh, **changes):
  """A reward model, which compiled ahead for the batches of this file."""
  config = dataclasses.replace(CONFIG.rewards, **changes)
  with jax.set_mesh(mesh):
    network = model.RewardModel(
      *("model_1", settings, config, mesh),
      bundles_at_a_time=8,
      images_per_shard=8,
      pan_and_scan=images.WHOLE,
    )
    network.compile_ahead([SHAPE], *LENGTHS.shape, 5)
  return network


def scored(network, mesh, prompts, completed):
  with jax.set_mesh(mesh):
    return network.start(prompts, completed)()["model_1"]


def read(folder):
  return networks.read_settings(
    f"hf:{folder}", POLICY, setting="rewards.models"
  )


@functools.partial(jax.jit, static_argnames="config")
def last_state(config, params, ids, length, pixels):
  found = text.prompt_states(
    config, params, ids, length, pixels, dtype=jnp.float32
  )
  return found[0][0, length[0] - 1]


def twin(settings, params, prompts, completed, row, column):
  """Reads prompt and completion as one sequence, its pixels from the record."""
  length = int(prompts.prompt_length[row])
  given = np.asarray(completed.ids)[row, column, : LENGTHS[row, column]]
  ids = np.concatenate([prompts.prompt_ids[row, :length], given])
  size = settings.network.vision.shown_size
  (picture,) = prompts.problems[row].images
  pixels = images.views(images.decode(picture), size, images.WHOLE)
  state = last_state(
    settings.network,
    params,
    jnp.asarray(np.pad(ids, (0, 160 - len(ids))))[None],
    jnp.array([len(ids)]),
    jnp.asarray(pixels)[None],
  )
  return float(state @ params["score"]["w"][0])


@pytest.mark.parametrize(
  "image_size", [24, pytest.param(None, marks=pytest.mark.nightly)]
)
def test_scores_are_those_of_single_sequences(
  folder, mesh, prompts, completed, image_size
):
  """Also for a tower that sees smaller images than the policy's."""
  settings = dataclasses.replace(read(folder), image_size=image_size)
  network = opened(settings, mesh)
  found = scored(network, mesh, prompts, completed)
  assert not network.program._is_called  # It ran what was compiled ahead.
  one = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  params = load.load_merged(settings, one)
  for place in ((0, 0), (0, 1), (5, 0), (14, 1)):
    wanted = twin(settings, params, prompts, completed, *place)
    assert found[place] == pytest.approx(wanted, abs=1e-5), place
  assert np.ptp(found[:15]) > 0.01


@pytest.mark.nightly
def test_batch_mates_padding_and_memory_change_no_score(
  folder, mesh, prompts, completed
):
  near, away = (
    opened(read(folder), mesh, network_memory=x)
    for x in ("device", "pinned_host")
  )
  found = scored(near, mesh, prompts, completed)
  np.testing.assert_array_equal(found, scored(away, mesh, prompts, completed))
  order = np.r_[15:-1:-1]
  others = dataclasses.replace(
    prompts,
    prompt_ids=prompts.prompt_ids[order],
    prompt_length=prompts.prompt_length[order],
    images=prompts.images[order],
    problems=prompts.problems[::-1],
    valid=prompts.valid[order],
  )
  ids, mask = (np.asarray(x)[order] for x in completed[:2])
  ids = np.where(mask, ids, 300)  # What stands in the padding is not read.
  ids, mask = sharding.device_put_batch(mesh, (ids, mask))
  again = scored(near, mesh, others, Completed(ids, mask, completed.texts))
  np.testing.assert_allclose(again[order], found, atol=1e-6)


def refuse(words, weights, policy=POLICY):
  config = dataclasses.replace(CONFIG.rewards, models=((weights, 1.0),))
  with pytest.raises(ValueError, match=words):
    model.read_models(config, policy)


def test_what_is_no_reward_model_of_this_family_is_refused(folder, tmp_path):
  found = read(folder)
  assert (found.name, found.head, found.lora.rank) == ("tiny", "score", 0)
  refuse("has no head that scores", "random:1")
  refuse("must name the weights", f"hf:{tmp_path}")
  refuse("give run:WORKDIR", "/somewhere")
  large = dataclasses.replace(POLICY, name="gemma3_4b")
  refuse("have the vocabulary and the image tokens of", f"hf:{folder}", large)


def test_a_model_that_cannot_read_the_prompts_is_refused(
  folder, tokenizer, tmp_path
):
  """Text models on pictures, and models of another tokenizer."""
  blind = dataclasses.replace(
    read(folder), name="gemma3_270m", weights="hf:elsewhere"
  )
  model.check_data([blind], tokenizer, has_images=False)
  with pytest.raises(ValueError, match="it is a text model"):
    model.check_data([blind], tokenizer, has_images=True)
  shutil.copytree(folder, tmp_path / "other")
  other = ["a quite different set of words to learn pieces from"] * 20
  tokens.train(other, tmp_path / "other" / "tokenizer.model", 420)
  with pytest.raises(
    ValueError, match="trained with the tokenizer of the data"
  ):
    model.check_data([read(tmp_path / "other")], tokenizer, has_images=True)
