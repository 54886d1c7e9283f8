"""The sampler draws what the settings say, in any number of parts."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from configs import base
from grpo_tpu.checkpoint import load
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import sharding
from grpo_tpu.rollout.sampler import Sampler

BASE = Config.from_config_dict(base.get_config())


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(replica=1, fsdp=8, tensor=1)


def test_the_marks_of_an_image_are_banned_where_tokens_are_scored(mesh):
  tokenizer = types.SimpleNamespace(start_of_image=7, end_of_image=9)
  sampler = Sampler(BASE.model, BASE.rollout, mesh, tokenizer)
  settings = sampler.engine_settings(2, 1.0)
  assert sampler.forward.banned_ids == settings.banned_ids == (7, 9)


def test_prompts_decoded_some_at_a_time_say_what_they_say_together(mesh):
  """Each prompt has the same draws, reported by its index in the batch."""
  rng = np.random.default_rng(0)
  model = dataclasses.replace(
    BASE.model, weights="random:0", compute_dtype="float32"
  )
  tower = model.network.vision
  batch = types.SimpleNamespace(
    prompt_ids=rng.integers(200, 900, (16, 6)).astype(np.int32),
    prompt_length=np.full(16, 6, np.int32),
    prompt_index=np.arange(16, dtype=np.int32),
    images=np.zeros((16, 1, tower.image_size, tower.image_size, 3), np.uint8),
  )
  settings = dataclasses.replace(BASE.rollout, max_new_tokens=5)
  tokenizer = types.SimpleNamespace(
    start_of_image=1000, end_of_image=1001, decode=str
  )
  sampler = Sampler(model, settings, mesh, tokenizer)
  results = []
  with jax.set_mesh(mesh):
    params = load.load_params(model, mesh)
    for num_parts in (1, 2):
      texts = {}
      sampled = sampler.sample(
        params,
        batch,
        jax.random.key(1),
        num_completions=2,
        temperature=1.0,
        num_parts=num_parts,
        on_finished=texts.update,
      )
      assert texts == dict(enumerate(sampler.texts(sampled.completions)))
      results.append(jax.device_get(sampled.completions))
  np.testing.assert_array_equal(results[0].ids, results[1].ids)
  np.testing.assert_array_equal(results[0].mask, results[1].mask)
  np.testing.assert_allclose(results[0].logps, results[1].logps, rtol=1e-5)
