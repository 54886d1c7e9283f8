"""The weights that a setting names are the weights that a run gets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import traverse_util

from configs import base
from data_pipelines.validation import SettingError
from grpo_tpu.checkpoint import load
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import leaves as gemma3_leaves
from grpo_tpu.models.gemma3 import lora
from grpo_tpu.models.settings import LoraConfig
from grpo_tpu.rl import learner, train_state
from tests.grpo_tpu.checkpoint import checkpointing

BASE = run_config.Config.from_config_dict(base.get_config())


@pytest.fixture(scope="module")
def mesh():
  """All devices, so that parameters are really cut."""
  return sharding.make_mesh(replica=1, fsdp=8, tensor=1)


def settings_of(weights, **model):
  return dataclasses.replace(BASE.model, weights=weights, **model)


@pytest.fixture
def params_of(mesh):
  return lambda weights, **model: load.load_params(
    settings_of(weights, **model), mesh
  )


def state_of(step, params):
  mesh = jax.tree.leaves(params)[0].sharding.mesh
  step = jax.device_put(jnp.int32(step), sharding.replicated_sharding(mesh))
  return train_state.TrainState(step, step, params, ())


def leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def save(workdir, params, scales, steps=(1,)):
  """Checkpoints of parameters, multiplied by each scale."""
  with checkpointing.opened(workdir / "checkpoints", keep=10) as checkpoints:
    for scale, step in zip(scales, steps, strict=True):
      scaled = jax.tree.map(functools.partial(jnp.multiply, scale), params)
      state = state_of(step, scaled)
      checkpoints.save(step, state, {})
  return leaves(params)


def test_random_weights_are_those_of_their_seed(params_of):
  first, again, other = (
    leaves(params_of(f"random:{seed}")) for seed in (3, 3, 4)
  )
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a, b)
  assert any((a != b).any() for a, b in zip(first, other, strict=True))


def test_weights_come_in_the_type_and_sharding_asked_for(mesh):
  settings = settings_of("random:0", param_dtype="bfloat16")
  got = load.load_params(settings, mesh)
  wanted = load.abstract_params(settings, mesh)
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
  params_of, tmp_path, name
):
  workdir = tmp_path / name
  saved = save(workdir, params_of("random:1"), (2.0, 3.0), steps=(4, 7))
  for step, scale in (("", 3.0), ("@7", 3.0), ("@4", 2.0)):
    if name == "run@5" and not step:
      continue  # Reads as step 5 of "run"; its step must be written out.
    got = leaves(params_of(f"run:{workdir}{step}"))
    for a, b in zip(got, saved, strict=True):
      np.testing.assert_array_equal(a, np.float32(scale) * b)


def test_the_newest_step_stays_the_one_it_was(params_of, tmp_path):
  """A run that is killed and started again must not jump to newer weights."""
  save(tmp_path, params_of("random:1"), (2.0,), steps=(4,))
  resolved = load.resolve_weights(f"run:{tmp_path}")
  assert resolved == f"run:{tmp_path}@4"
  save(tmp_path, params_of("random:1"), (5.0,), steps=(9,))
  assert load.resolve_weights(resolved) == resolved
  assert load.resolve_weights(f"run:{tmp_path}") == f"run:{tmp_path}@9"


def test_the_best_step_is_resolved_and_read(params_of, tmp_path):
  """Also without a step written out, as a notebook may name it."""
  params = params_of("random:1")
  folder = tmp_path / "checkpoints"
  with checkpointing.opened(folder, best_metric="eval/accuracy") as checkpoints:
    for step, accuracy in enumerate((0.1, 0.8, 0.8, 0.5), start=1):
      state = {"params": jax.tree.map(lambda x, s=step: s * x, params)}
      metrics = {"eval/accuracy": accuracy}
      checkpoints.save(step, state, {}, metrics=metrics)
  assert load.resolve_weights(f"run:{tmp_path}@best") == f"run:{tmp_path}@3"
  best = params_of(f"run:{tmp_path}@best")
  for a, b in zip(leaves(best), leaves(params), strict=True):
    np.testing.assert_array_equal(a, np.float32(3) * b)


def test_random_weights_resolve_to_themselves():
  assert load.resolve_weights("random:5") == "random:5"


def test_a_workdir_with_an_at_sign_resolves_to_its_own_newest(
  params_of, tmp_path
):
  save(tmp_path / "me@host", params_of("random:1"), (1.0,), steps=(6,))
  name = f"run:{tmp_path}/me@host"
  assert load.resolve_weights(name) == f"{name}@6"


def test_another_models_checkpoint_is_refused_leaf_by_leaf(params_of, tmp_path):
  save(tmp_path, params_of("random:1"), (1.0,))
  with pytest.raises(ValueError, match="(?s)input_embedding: saved .*model"):
    params_of(f"run:{tmp_path}", name="gemma3_270m")


LORA = LoraConfig(rank=8, alpha=4.0, targets=("q", "linear"), init="")


def save_adapters(workdir, mesh, base_weights, *, step=3):
  """A checkpoint as a run with LoRA writes it, its second factors drawn."""
  rng = np.random.default_rng(step)
  settings = settings_of("random:2", lora=LORA)
  adapters = jax.tree.map(
    lambda x: jax.device_put(
      rng.normal(0, 0.2, x.shape).astype(np.float32), x.sharding
    ),
    load.initial_adapters(settings, mesh, seed=0),
  )
  meta = {"lora": dataclasses.asdict(LORA) | {"weights": base_weights}}
  with checkpointing.opened(workdir / "checkpoints", keep=10) as checkpoints:
    checkpoints.save(step, state_of(step, adapters), meta)
  return adapters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_adapters_is_read_as_the_policy_that_it_trained(
  params_of, mesh, tmp_path, dtype
):
  """To the bit, in the type of its base. The second is based on the first."""
  first = save_adapters(tmp_path / "a", mesh, "random:2")
  second = save_adapters(tmp_path / "b", mesh, f"run:{tmp_path}/a@3", step=4)
  policy = params_of("random:2", param_dtype=dtype)
  for name, adapters in (("a", first), ("b", second)):
    model = settings_of(f"run:{tmp_path}/{name}", param_dtype=dtype, lora=LORA)
    policy = learner.forward_params(model, adapters, policy)
    jax.tree.map(
      np.testing.assert_array_equal, load.load_params(model, mesh), policy
    )


def test_a_run_with_adapters_continues_as_the_model_they_made(
  params_of, mesh, tmp_path
):
  """The adapters of a run that starts from it are merged onto that model."""
  first = save_adapters(tmp_path / "a", mesh, "random:2")
  second = save_adapters(tmp_path / "b", mesh, f"run:{tmp_path}/a@3", step=4)
  expected = params_of("random:2")
  for name, adapters in (("a", first), ("b", second)):
    expected = lora.merge_adapters(lora.with_adapters(expected, adapters, LORA))
    settings = settings_of(f"run:{tmp_path}/{name}")
    got = load.load_merged(settings, mesh)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6),
      got,
      expected,
    )
    abstract = load.abstract_params(settings, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    assert jax.tree.map(lambda x: x.sharding, got) == shardings


def test_saved_adapters_come_with_what_they_belong_to(
  params_of, mesh, tmp_path
):
  def adapters_of(weights):
    return load.load_adapters(settings_of(weights), mesh)

  assert adapters_of("random:2") is None
  saved = save_adapters(tmp_path / "a", mesh, "random:2")
  found = adapters_of(f"run:{tmp_path}/a")
  assert found is not None
  assert (found.config, found.base_weights) == (LORA, "random:2")
  jax.tree.map(np.testing.assert_array_equal, found.adapters, saved)
  # What only training with adapters of one's own forbids is no matter.
  towers = settings_of(
    f"run:{tmp_path}/a", train_vision=True, reference_dtype="bfloat16"
  )
  assert load.load_adapters(towers, mesh) is not None
  save(tmp_path / "whole", params_of("random:2"), (1.0,))
  assert adapters_of(f"run:{tmp_path}/whole") is None


def test_adapters_whose_base_is_gone_are_refused_with_its_name(
  params_of, mesh, tmp_path
):
  save_adapters(tmp_path / "a", mesh, f"run:{tmp_path}/gone@7")
  with pytest.raises(
    ValueError, match=r"/a@3'\).*adapters only.*/gone@7'"
  ) as e:
    params_of(f"run:{tmp_path}/a")
  assert "no checkpoint" in str(e.value)


def test_released_weights_lie_where_the_rules_say(params_of, mesh, tmp_path):
  """They get the shardings that random ones get."""
  drawn = params_of("random:2")
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "gemma", in_the_librarys_layout(drawn))
  settings = settings_of(f"gemma:{tmp_path / 'gemma'}", param_dtype="bfloat16")
  loaded = load.load_params(settings, mesh)
  for x, want, value in zip(
    jax.tree.leaves(loaded),
    jax.tree.leaves(load.abstract_params(settings, mesh)),
    leaves(drawn),
    strict=True,
  ):
    assert x.dtype == want.dtype
    assert x.sharding.is_equivalent_to(want.sharding, x.ndim)
    np.testing.assert_array_equal(x, value.astype(want.dtype))


def in_the_librarys_layout(params):
  """By the names that the loader reads, which its own tests hold."""
  tensors = {}
  for path, value in gemma3_leaves.by_path(params).items():
    leaf = gemma3_leaves.LEAVES[path]
    for index in np.ndindex(value.shape[: leaf.axes.startswith("l")]):
      tensors[leaf.gemma.format(*index)] = np.asarray(value[index])
  return traverse_util.unflatten_dict(tensors, sep="/")


@pytest.mark.parametrize("step", ["", "@8"])
def test_a_run_without_the_checkpoint_is_refused(params_of, tmp_path, step):
  if step:
    save(tmp_path, params_of("random:1"), (1.0,))
  with pytest.raises(ValueError, match=f"no checkpoint.*{tmp_path}"):
    params_of(f"run:{tmp_path}{step}")
  if not step:
    with pytest.raises(ValueError, match=f"no checkpoint.*{tmp_path}"):
      load.resolve_weights(f"run:{tmp_path}")


def head_of(params):
  return np.asarray(params["score"]["w"])


def with_drawn_head(params, seed=0):
  head = params["score"]["w"]
  drawn = np.random.default_rng(seed).normal(size=head.shape)
  return params | {"score": {"w": jax.device_put(drawn, head.sharding)}}


def test_a_head_starts_at_zero_unless_its_source_has_one(
  params_of, tmp_path, caplog
):
  save(tmp_path / "policy", params_of("random:1"), (1.0,))
  with caplog.at_level("INFO", "absl"):
    start = params_of(f"run:{tmp_path}/policy", head="score")
  assert "policy@1 has no head; it starts at zero." in caplog.text
  assert not head_of(start).any()
  trained = with_drawn_head(start)
  save(tmp_path / "reward_model", trained, (1.0,))
  name = f"run:{tmp_path}/reward_model"
  caplog.clear()
  again = params_of(name, head="score")
  jax.tree.map(np.testing.assert_array_equal, again, trained)
  assert "starts at zero" not in caplog.text
  with pytest.raises(
    SettingError, match=r"model.weights \('run:.*reward model.*rewards.models"
  ):
    params_of(name)


def test_a_head_is_trained_beside_adapters_and_comes_back_with_them(
  params_of, mesh, tmp_path
):
  """The second run starts from the first, and from its head."""
  name, heads = "random:2", {}
  for step, run in enumerate(("a", "b")):
    settings = settings_of(name, lora=LORA, head="score")
    frozen = load.load_params(settings, mesh)
    adapters = load.initial_adapters(settings, mesh, seed=0, frozen=frozen)
    np.testing.assert_array_equal(head_of(adapters), head_of(frozen))
    adapters = heads[run] = with_drawn_head(adapters, seed=step)
    meta = {"lora": dataclasses.asdict(LORA) | {"weights": name}}
    folder = tmp_path / run / "checkpoints"
    with checkpointing.opened(folder, keep=10) as checkpoints:
      checkpoints.save(1, state_of(1, adapters), meta)
    name = f"run:{tmp_path}/{run}@1"
    np.testing.assert_array_equal(
      head_of(params_of(name, head="score")), head_of(adapters)
    )
  merged = load.load_merged(settings_of(name, head="score"), mesh)
  np.testing.assert_array_equal(head_of(merged), head_of(heads["b"]))
  with pytest.raises(SettingError, match="reward model"):
    params_of(name)
