"""The weights that a setting names are the weights that a run gets."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from grpo_tpu import checkpoint, sharding, train_state
from grpo_tpu import config as run_config
from grpo_tpu import policy as policies

BASE = run_config.Config.from_config_dict(base.get_config())


@pytest.fixture(scope="module")
def mesh():
  """All devices, so that parameters are really cut."""
  return sharding.make_mesh(replica=1, fsdp=8, tensor=1)


@pytest.fixture
def policy_of(mesh):
  def policy(weights, **model):
    settings = dataclasses.replace(BASE.model, weights=weights, **model)
    config = dataclasses.replace(BASE, model=settings)
    return policies.Policy(config, mesh, None)  # No text is read or written.

  return policy


def test_the_marks_of_an_image_are_banned_where_tokens_are_scored(mesh):
  tokenizer = types.SimpleNamespace(start_of_image=7, end_of_image=9)
  policy = policies.Policy(BASE, mesh, tokenizer)
  assert policy.model.banned_ids == policy.banned_ids == (7, 9)


def leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def save(workdir, policy, scales, steps=(1,)):
  """Checkpoints of the policy's parameters, multiplied by each scale."""
  params = policy.initial_params()
  with checkpoint.Checkpoints(
    workdir / "checkpoints", every_steps=1, keep=10
  ) as checkpoints:
    for scale, step in zip(scales, steps, strict=True):
      scaled = jax.tree.map(functools.partial(jnp.multiply, scale), params)
      at = jax.device_put(jnp.int32(step), sharding.replicated(policy.mesh))
      state = train_state.TrainState(at, at, scaled, ())
      checkpoints.save(step, state, {})
  return leaves(params)


def test_random_weights_are_those_of_their_seed(policy_of):
  first, again, other = (
    leaves(policy_of(f"random:{seed}").initial_params()) for seed in (3, 3, 4)
  )
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a, b)
  assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_weights_come_in_the_type_and_places_asked_for(policy_of):
  policy = policy_of("random:0", param_dtype="bfloat16")
  got, wanted = policy.initial_params(), policy.abstract_params()
  jax.tree.map(
    lambda x, w: (
      (x.shape, x.dtype, x.sharding) == (w.shape, w.dtype, w.sharding)
      or pytest.fail(f"{x.sharding} {x.dtype} for {w}")
    ),
    got,
    wanted,
  )
  embedding = got["embedder"]["input_embedding"]
  assert embedding.dtype == jnp.bfloat16
  assert not embedding.sharding.is_fully_replicated


@pytest.mark.parametrize("name", ["run", "run@home", "run@5"])
def test_a_run_begins_where_the_named_checkpoint_ended(
  policy_of, tmp_path, name
):
  workdir = tmp_path / name
  saved = save(workdir, policy_of("random:1"), (2.0, 3.0), steps=(4, 7))
  for step, scale in (("", 3.0), ("@7", 3.0), ("@4", 2.0)):
    if name == "run@5" and not step:
      continue  # Reads as step 5 of "run"; its step must be written out.
    got = leaves(policy_of(f"run:{workdir}{step}").initial_params())
    for a, b in zip(got, saved, strict=True):
      np.testing.assert_array_equal(a, np.float32(scale) * b)


def test_the_newest_step_stays_the_one_it_was(policy_of, tmp_path):
  """A run that is killed and started again must not jump to newer weights."""
  save(tmp_path, policy_of("random:1"), (2.0,), steps=(4,))
  named = policy_of(f"run:{tmp_path}").config
  resolved = policies.resolved_weights(named)
  assert resolved == f"run:{tmp_path}@4"
  save(tmp_path, policy_of("random:1"), (5.0,), steps=(9,))
  assert policies.resolved_weights(policy_of(resolved).config) == resolved
  assert policies.resolved_weights(named) == f"run:{tmp_path}@9"


def test_random_weights_resolve_to_themselves(policy_of):
  assert policies.resolved_weights(policy_of("random:5").config) == "random:5"


def test_a_workdir_with_an_at_sign_resolves_to_its_own_newest(
  policy_of, tmp_path
):
  save(tmp_path / "me@host", policy_of("random:1"), (1.0,), steps=(6,))
  config = policy_of(f"run:{tmp_path}/me@host").config
  assert policies.resolved_weights(config) == f"run:{tmp_path}/me@host@6"


def test_another_models_checkpoint_is_refused_leaf_by_leaf(policy_of, tmp_path):
  save(tmp_path, policy_of("random:1"), (1.0,))
  other = policy_of(f"run:{tmp_path}", param_dtype="bfloat16")
  with pytest.raises(ValueError, match="(?s)saved float32.*wanted bfloat16"):
    other.initial_params()
  larger = policy_of(f"run:{tmp_path}", name="gemma3_270m")
  with pytest.raises(ValueError, match="(?s)input_embedding: saved .*model"):
    larger.initial_params()


@pytest.mark.parametrize("step", ["", "@8"])
def test_a_run_without_the_checkpoint_is_refused(policy_of, tmp_path, step):
  if step:
    save(tmp_path, policy_of("random:1"), (1.0,))
  policy = policy_of(f"run:{tmp_path}{step}")
  with pytest.raises(ValueError, match=f"no checkpoint.*{tmp_path}"):
    policy.initial_params()
  if not step:
    with pytest.raises(ValueError, match=f"no checkpoint.*{tmp_path}"):
      policies.resolved_weights(policy.config)
