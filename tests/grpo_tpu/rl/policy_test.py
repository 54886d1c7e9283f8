"""The weights that a setting names are the weights that a run gets."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import base
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import lora
from grpo_tpu.models.gemma3.convert import assembly, orbax_gemma
from grpo_tpu.models.settings import LoraConfig
from grpo_tpu.rl import policy as policies
from grpo_tpu.rl import score, train_state
from grpo_tpu.rl.train_batch import TrainBatch
from tests.grpo_tpu.checkpoint import checkpointing

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
    # No text is read or written.
    marks = types.SimpleNamespace(start_of_image=1000, end_of_image=1001)
    return policies.Policy(config, mesh, marks)

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
  with checkpointing.opened(workdir / "checkpoints", keep=10) as checkpoints:
    for scale, step in zip(scales, steps, strict=True):
      scaled = jax.tree.map(functools.partial(jnp.multiply, scale), params)
      at = jax.device_put(
        jnp.int32(step), sharding.replicated_sharding(policy.mesh)
      )
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


def test_a_reference_in_bfloat16_keeps_norms_and_the_tower(policy_of):
  """What the network casts to bf16 anyhow is kept so, and nothing else."""
  policy = policy_of("random:1", reference_dtype="bfloat16")
  params = policy.initial_params()
  kept = 0
  for (path, x), y in zip(
    jax.tree_util.tree_leaves_with_path(params),
    jax.tree.leaves(policy.reference(params)),
    strict=True,
  ):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_kept = "vision_encoder" in name or name.endswith("scale")
    kept += is_kept
    assert y.dtype == (jnp.float32 if is_kept else jnp.bfloat16), name
    assert y.sharding == x.sharding, name
    np.testing.assert_array_equal(x.astype(y.dtype), y)
  assert 0 < kept < len(jax.tree.leaves(params))
  same = policy_of("random:1")
  assert same.reference(params) is params is same.on_device(params)


def test_a_reference_in_bfloat16_scores_alike_under_compute_in_bfloat16(
  policy_of,
):
  """To the bit: the network casts the same numbers, only later."""
  policy = policy_of(
    "random:1", reference_dtype="bfloat16", compute_dtype="bfloat16"
  )
  params = policy.initial_params()
  # Norms that bf16 cannot hold, for drawn ones are zeros and ones.
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x + 0.001234 if path[-1].key == "scale" else x, params
  )
  ids = np.random.default_rng(0).integers(110, 900, (1, 2, 6))
  bundles = TrainBatch(
    prompt_ids=jnp.asarray(ids[:, 0], jnp.int32),
    prompt_length=jnp.array([6]),
    images=jnp.zeros((1, 0, 48, 48, 3), jnp.uint8),
    completion_ids=jnp.asarray(ids, jnp.int32),
    completion_mask=jnp.ones(ids.shape, bool),
  )
  whole, kept = (
    score.score_batch(
      policy.model,
      jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), tree),
      bundles,
      num_microbatches=1,
    )
    for tree in (params, policy.reference(params))
  )
  jax.tree.map(np.testing.assert_array_equal, whole, kept)


def test_a_reference_in_host_memory_comes_back_to_the_devices(policy_of):
  policy = policy_of("random:1", reference_memory="pinned_host")
  params = policy.initial_params()
  reference = policy.reference(params)
  for x, away, back in zip(
    *map(jax.tree.leaves, (params, reference, policy.on_device(reference))),
    strict=True,
  ):
    assert away.sharding.memory_kind == "pinned_host"
    assert back.sharding.memory_kind == "device"
    assert back.sharding.spec == x.sharding.spec
    np.testing.assert_array_equal(back, x)


def test_a_memory_that_the_devices_lack_is_refused(policy_of, monkeypatch):
  """Before anything is placed."""
  policy = policy_of("random:1", reference_memory="pinned_host")
  device = type("Device", (), {"addressable_memories": lambda _: []})()
  mesh = type("Mesh", (), {"local_devices": [device]})()
  policy = dataclasses.replace(policy, mesh=mesh)
  with pytest.raises(
    ValueError, match=r"^model.reference_memory \('pinned_host'\) must"
  ):
    policy.reference({})


LORA = LoraConfig(rank=8, alpha=4.0, targets=("q", "linear"))


def save_adapters(workdir, policy, under, *, step=3):
  """A checkpoint as a run with LoRA writes it, its second factors drawn."""
  rng = np.random.default_rng(step)
  adapters = jax.tree.map(
    lambda x: jax.device_put(
      rng.normal(0, 0.2, x.shape).astype(np.float32), x.sharding
    ),
    policy.initial_adapters(LORA),
  )
  at = jax.device_put(
    jnp.int32(step), sharding.replicated_sharding(policy.mesh)
  )
  meta = {"lora": dataclasses.asdict(LORA) | {"weights": under}}
  with checkpointing.opened(workdir / "checkpoints", keep=10) as checkpoints:
    state = train_state.TrainState(at, at, adapters, ())
    checkpoints.save(step, state, meta)
  return adapters


def test_a_run_with_adapters_goes_on_as_the_model_they_made(
  policy_of, tmp_path
):
  """And its heir's adapters are merged onto that, whatever stands in its."""
  random = policy_of("random:2")
  first = save_adapters(tmp_path / "a", random, "random:2")
  under = f"run:{tmp_path}/a@3"
  second = save_adapters(tmp_path / "b", random, under, step=4)
  expected = random.initial_params()
  for name, adapters in (("a", first), ("b", second)):
    expected = lora.merge_adapters(expected, adapters, LORA)
    policy = policy_of(f"run:{tmp_path}/{name}")
    got = policy.initial_params()
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
      got,
      expected,
    )
    places = jax.tree.map(lambda x: x.sharding, policy.abstract_params())
    assert jax.tree.map(lambda x: x.sharding, got) == places


def found_adapters(policy):
  return policies.saved_adapters(policy.config, policy.mesh)


def test_saved_adapters_come_with_what_they_belong_to(policy_of, tmp_path):
  random = policy_of("random:2")
  assert found_adapters(random) is None
  saved = save_adapters(tmp_path / "a", random, "random:2")
  found = found_adapters(policy_of(f"run:{tmp_path}/a"))
  assert found is not None
  adapters, settings, under = found
  assert (settings, under) == (LORA, "random:2")
  jax.tree.map(np.testing.assert_array_equal, adapters, saved)
  save(tmp_path / "whole", random, (1.0,))
  assert found_adapters(policy_of(f"run:{tmp_path}/whole")) is None


def test_adapters_whose_base_is_gone_are_refused_with_its_name(
  policy_of, tmp_path
):
  under = f"run:{tmp_path}/gone@7"
  save_adapters(tmp_path / "a", policy_of("random:2"), under)
  with pytest.raises(ValueError, match=r"/a'\).*adapters alone.*/gone@7'") as e:
    policy_of(f"run:{tmp_path}/a").initial_params()
  assert "no checkpoint" in str(e.value)


def test_released_weights_lie_where_the_rules_say(policy_of, tmp_path):
  """The same numbers in the places that drawn ones get."""
  drawn = policy_of("random:2").initial_params()
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "gemma", in_the_librarys_layout(drawn))
  policy = policy_of(f"gemma:{tmp_path / 'gemma'}", param_dtype="bfloat16")
  loaded = policy.initial_params()
  for x, want, value in zip(
    jax.tree.leaves(loaded),
    jax.tree.leaves(policy.abstract_params()),
    leaves(drawn),
    strict=True,
  ):
    assert x.dtype == want.dtype
    assert x.sharding.is_equivalent_to(want.sharding, x.ndim)
    np.testing.assert_array_equal(x, value.astype(want.dtype))


def in_the_librarys_layout(params):
  """By the names that the loader reads, which its own tests hold."""
  wanted = {
    orbax_gemma._library_name(path, layer): (path, layer)
    for path, layer, _ in assembly.pieces(params)
  }
  found = assembly.by_path(params)
  tree = {}
  for name, (path, layer) in wanted.items():
    *parents, last = name.split("/")
    inner = tree
    for parent in parents:
      inner = inner.setdefault(parent, {})
    leaf = np.asarray(found[path])
    inner[last] = leaf if layer is None else leaf[layer]
  return tree


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


def test_prompts_decoded_some_at_a_time_say_what_they_say_together(policy_of):
  """Each with the same draws, told by its place in the batch."""
  rng = np.random.default_rng(0)
  policy = policy_of("random:0", compute_dtype="float32")
  tower = policy.config.model_config.vision
  batch = types.SimpleNamespace(
    prompt_ids=rng.integers(200, 900, (16, 6)).astype(np.int32),
    prompt_length=np.full(16, 6, np.int32),
    prompt_index=np.arange(16, dtype=np.int32),
    images=np.zeros((16, 1, tower.image_size, tower.image_size, 3), np.uint8),
  )
  settings = dataclasses.replace(policy.config.rollout, max_new_tokens=5)
  config = dataclasses.replace(policy.config, rollout=settings)
  tokenizer = types.SimpleNamespace(
    start_of_image=1000, end_of_image=1001, decode=str
  )
  policy = policies.Policy(config, policy.mesh, tokenizer)
  said = []
  with jax.set_mesh(policy.mesh):
    params = policy.initial_params()
    for num_parts in (1, 2):
      texts = {}
      sampled = policy.sample(
        params,
        batch,
        jax.random.key(1),
        num_completions=2,
        temperature=1.0,
        num_parts=num_parts,
        finished=texts.update,
      )
      assert texts == dict(enumerate(policy.texts(sampled.completions)))
      said.append(jax.device_get(sampled.completions))
  np.testing.assert_array_equal(said[0].ids, said[1].ids)
  np.testing.assert_array_equal(said[0].mask, said[1].mask)
  np.testing.assert_allclose(said[0].logps, said[1].logps, rtol=1e-5)
