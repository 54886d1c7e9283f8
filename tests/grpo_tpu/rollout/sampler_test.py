"""The sampler draws what the settings say, in any number of parts."""

import collections
import dataclasses
import types

import jax
import numpy as np
import pytest

from configs import base
from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.checkpoint import load
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import sharding
from grpo_tpu.rollout.sampler import Sampler

BASE = Config.from_config_dict(base.get_config())


MARKS = types.SimpleNamespace(
  start_of_image=1000, end_of_image=1001, decode=str
)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(replica=1, fsdp=8, tensor=1)


def test_the_marks_of_an_image_are_banned_where_tokens_are_scored(mesh):
  tokenizer = types.SimpleNamespace(start_of_image=7, end_of_image=9)
  sampler = Sampler(BASE.model, BASE.rollout, mesh, tokenizer)
  settings = sampler.engine_settings(2, 1.0)
  assert sampler.forward.banned_ids == settings.banned_ids == (7, 9)


def test_prompts_say_what_they_say_alone_or_beside_any_others(mesh):
  """In any number of parts, and beside a prompt that is not valid.

  Each prompt has the same draws, reported by its index in the batch.
  """
  rng = np.random.default_rng(0)
  model = dataclasses.replace(
    BASE.model, weights="random:0", compute_dtype="float32"
  )
  tower = model.network.vision
  whole = types.SimpleNamespace(
    prompt_ids=rng.integers(200, 900, (16, 6)).astype(np.int32),
    prompt_length=np.full(16, 6, np.int32),
    prompt_index=np.arange(16, dtype=np.int32),
    valid=np.ones(16, bool),
    images=np.zeros((16, 1, tower.image_size, tower.image_size, 3), np.uint8),
  )
  settings = dataclasses.replace(BASE.rollout, max_new_tokens=5)
  sampler = Sampler(model, settings, mesh, MARKS)
  # A prompt that asks nothing, as padding does.
  part = types.SimpleNamespace(**vars(whole) | {"valid": np.arange(16) != 5})
  results, costs = [], []
  with jax.set_mesh(mesh):
    params = load.load_params(model, mesh)
    for num_parts, batch in ((1, whole), (2, whole), (1, part), (2, part)):
      finished = []
      sampled = sampler.sample(
        params,
        batch,
        jax.random.key(1),
        num_completions=2,
        temperature=1.0,
        num_parts=num_parts,
        on_finished=lambda *new, kept=finished: kept.append(new),
      )
      texts, flags = (
        dict(collections.ChainMap(*x)) for x in zip(*finished, strict=True)
      )
      assert texts == dict(enumerate(sampler.texts(sampled.completions)))
      cut_off = ~np.asarray(sampled.completions.stopped)
      assert flags == dict(enumerate(cut_off.tolist()))
      results.append(jax.device_get(sampled.completions))
      costs.append(sampled.metrics["perf/decode_bytes"])
  first = results[0]
  for other, asked in zip(results[1:], (whole, part, part), strict=True):
    # Token for token what it was, and nothing for a prompt that is not valid.
    kept = first.mask & asked.valid[:, None, None]
    np.testing.assert_array_equal(other.mask, kept)
    np.testing.assert_array_equal(other.ids, np.where(kept, first.ids, 0))
    np.testing.assert_allclose(
      other.logps, np.where(kept, first.logps, 0), rtol=1e-5
    )
    np.testing.assert_array_equal(
      other.stopped, first.stopped & asked.valid[:, None]
    )
  assert costs[2] < costs[0]


def test_a_text_says_the_same_beside_pictures(mesh):
  """Token for token; in a batch of texts alone no tower runs."""
  rng = np.random.default_rng(0)
  model = dataclasses.replace(
    BASE.model, weights="random:0", compute_dtype="float32"
  )
  vision = model.network.vision
  soft, side = vision.soft_tokens, vision.image_size
  ids = rng.integers(200, 900, (16, 3 * soft)).astype(np.int32)
  length = np.full(16, 9, np.int32)
  images = np.zeros((16, 2, side, side, 3), np.uint8)
  for row in range(1, 16, 2):
    count = 1 + row % 4 // 2
    length[row] = 5 + count * (soft + 1)
    for i in range(count):
      start = 3 + i * (soft + 1)
      ids[row, start : start + soft] = GEMMA3.image_placeholder
      images[row, i] = rng.integers(0, 256, (side, side, 3))
  mixed = types.SimpleNamespace(
    prompt_ids=ids,
    prompt_length=length,
    prompt_index=np.arange(16, dtype=np.int32),
    valid=np.ones(16, bool),
    images=images,
  )
  texts = {k: x[::2] for k, x in vars(mixed).items()}
  texts |= {"images": images[::2, :0], "prompt_ids": ids[::2, :12]}
  settings = dataclasses.replace(BASE.rollout, max_new_tokens=5)
  sampler = Sampler(model, settings, mesh, MARKS)
  results, counts = [], []
  with jax.set_mesh(mesh):
    params = load.load_params(model, mesh)
    for batch in (mixed, types.SimpleNamespace(**texts)):
      sampled = sampler.sample(
        params, batch, jax.random.key(1), num_completions=2, temperature=1.0
      )
      results.append(jax.device_get(sampled.completions))
      counts.append(sampled.metrics["perf/pictures_encoded"])
      sampler.image_encoder.encode = None  # Fails if it is called again.
  assert counts == [12, 0]
  beside, alone = results
  np.testing.assert_array_equal(beside.ids[::2], alone.ids)
  np.testing.assert_allclose(beside.logps[::2], alone.logps, atol=1e-5)
