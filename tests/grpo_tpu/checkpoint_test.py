"""Laws of checkpoints: what is saved comes back, or the error says why not."""

import contextlib
import resource

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_tpu import checkpoint
from tests.grpo_tpu import checkpointing

META = {"fingerprint": "ab12", "position": 96, "config": {"beta": 0.1}}


@flax.struct.dataclass
class State:
  params: dict
  opt_state: optax.OptState
  key: jax.Array
  step: jax.Array


def make_state(mesh=None, *, seed=0, dtype=jnp.float32, width=4):
  """A state of every kind of leaf; laid out over `mesh` where one is given."""
  w, b = (
    jax.random.normal(jax.random.key(seed + i), (8, width)) for i in (0, 1)
  )
  params = {"attention": {"w": w.astype(dtype)}, "b": b.astype(jnp.bfloat16)}
  state = State(
    params=params,
    opt_state=optax.adamw(1e-3).init(params),
    key=jax.random.key(seed + 2),
    step=jnp.int32(seed),
  )
  return (
    state if mesh is None else jax.device_put(state, shardings(state, mesh))
  )


def shardings(state, mesh):
  return jax.tree.map(
    lambda leaf: NamedSharding(
      mesh, PartitionSpec("fsdp", "tensor") if leaf.ndim else PartitionSpec()
    ),
    state,
  )


def assert_trees_equal(tree, expected):
  """Same structure, and every leaf equal in value, dtype and layout."""
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  for leaf, other in zip(
    jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True
  ):
    assert leaf.dtype == other.dtype
    assert leaf.sharding == other.sharding
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
    np.testing.assert_array_equal(leaf, other)


def names(path):
  """Of the checkpoints there, each of which has its manifest beside it."""
  names = sorted(each.name for each in path.iterdir() if each.name != "lock")
  manifests = [name for name in names if name.endswith(".json")]
  folders = [name for name in names if not name.endswith(".json")]
  assert manifests == [f"{name}.manifest.json" for name in folders]
  return folders


def save_one(path, state, step=1):
  with checkpointing.opened(path) as checkpoints:
    assert checkpoints.save(step, state, META)


def large_state():
  """One leaf: Orbax leaves the writes beside a failed one behind, and warns."""
  return {"w": jax.random.normal(jax.random.key(0), (1 << 16,))}


@contextlib.contextmanager
def files_no_larger_than(num_bytes):
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
  state = make_state(jax.make_mesh((4, 2), ("fsdp", "tensor")))
  save_one(tmp_path, state)
  with checkpointing.opened(tmp_path) as checkpoints:
    restored = checkpoints.restore(state)
  assert restored is not None
  assert_trees_equal(restored.state, state)
  assert (restored.step, restored.meta) == (1, META)
  assert restored.unfinished is None


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (8, 1)])
def test_a_state_is_restored_onto_another_mesh(tmp_path, shape):
  saved = make_state(jax.make_mesh((4, 2), ("fsdp", "tensor")))
  devices = jax.devices()[: shape[0] * shape[1]]
  mesh = jax.make_mesh(shape, ("fsdp", "tensor"), devices=devices)
  expected = make_state(mesh)
  save_one(tmp_path, saved)
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding
    ),
    expected,
  )
  with checkpointing.opened(tmp_path) as checkpoints:
    restored = checkpoints.restore(abstract)
  assert restored is not None
  assert_trees_equal(restored.state, expected)


def test_an_empty_directory_restores_nothing(tmp_path):
  with checkpointing.opened(tmp_path / "new") as checkpoints:
    assert checkpoints.restore(make_state()) is None


def test_the_newest_step_is_restored(tmp_path):
  with checkpointing.opened(tmp_path) as checkpoints:
    for step in (1, 2, 10):
      checkpoints.save(step, make_state(seed=step), {"is": step})
    newest = checkpoints.restore(make_state())
  assert newest is not None
  assert_trees_equal(newest.state, make_state(seed=10))
  assert (newest.step, newest.meta) == (10, {"is": 10})


def test_only_due_and_forced_steps_are_saved(tmp_path):
  state = make_state()
  with checkpointing.opened(tmp_path, every_steps=3) as checkpoints:
    saved = [step for step in range(1, 8) if checkpoints.save(step, state, {})]
    assert saved == [3, 6]
    assert checkpoints.save(8, state, {}, force=True)
  assert checkpoint.steps(tmp_path) == [3, 6, 8]


def test_a_step_saved_already_is_left_alone(tmp_path):
  with checkpointing.opened(tmp_path, every_steps=2) as checkpoints:
    assert checkpoints.save(2, make_state(seed=1), META)
    assert not checkpoints.save(2, make_state(seed=2), META, force=True)
    restored = checkpoints.restore(make_state())
  assert restored is not None
  assert_trees_equal(restored.state, make_state(seed=1))


@pytest.mark.parametrize("force", [True, False])
def test_a_step_older_than_the_newest_is_refused(tmp_path, force):
  save_one(tmp_path, make_state(), step=4)
  with checkpointing.opened(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=r"step 3 .* newest checkpoint \(4\)"):
      checkpoints.save(3, make_state(), META, force=force)
  assert checkpoint.steps(tmp_path) == [4]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
  with checkpointing.opened(tmp_path, keep=2) as checkpoints:
    for step in (1, 2, 3, 4):
      checkpoints.save(step, make_state(), META)
  assert names(tmp_path) == ["00000003", "00000004"]


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
  state = make_state(width=4096)
  expected = jax.tree.map(jnp.copy, state)
  overwrite = jax.jit(
    lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0
  )
  with checkpointing.opened(tmp_path) as checkpoints:
    checkpoints.save(1, state, META)
    params = overwrite(state.params)
    for _ in range(5):
      params = overwrite(params)
    restored = checkpoints.restore(expected)
  assert restored is not None
  assert_trees_equal(restored.state, expected)


@pytest.mark.parametrize(
  ("wanted", "complaint"),
  [
    (
      lambda: make_state(dtype=jnp.bfloat16),
      r"params/attention/w: saved float32\[8,4\], wanted bfloat16\[8,4\]",
    ),
    (
      lambda: make_state(width=5),
      r"params/b: saved bfloat16\[8,4\], wanted bfloat16\[8,5\]",
    ),
    (
      lambda: make_state().replace(opt_state=()),
      r"opt_state/0/count: saved int32\[\], wanted nothing",
    ),
    (
      lambda: make_state().replace(step=(jnp.int32(0), jnp.int32(0))),
      r"step/1: saved nothing, wanted int32\[\]",
    ),
    (
      lambda: make_state().replace(key=jax.random.key(0, impl="rbg")),
      r"key: saved key<fry>\[\], wanted key<rbg>\[\]",
    ),
  ],
  ids=["dtype", "shape", "extra", "missing", "key"],
)
def test_a_leaf_that_differs_is_named(tmp_path, wanted, complaint):
  save_one(tmp_path, make_state())
  with checkpointing.opened(tmp_path) as checkpoints:
    with pytest.raises(ValueError, match=complaint):
      checkpoints.restore(wanted())


def test_a_long_list_of_differing_leaves_is_cut(tmp_path):
  save_one(tmp_path, {"w": jnp.zeros(2)})
  with checkpointing.opened(tmp_path) as checkpoints:
    with pytest.raises(ValueError) as error:
      checkpoints.restore([jnp.zeros(2)] * 30)
  assert str(error.value).count("wanted float32[2]") == 10
  assert "and 21 more" in str(error.value)


def test_the_parameters_of_another_run_are_read_alone(tmp_path):
  """Neither its optimizer nor its other leaves need be known."""
  state = make_state(jax.make_mesh((4, 2), ("fsdp", "tensor")), seed=3)
  save_one(tmp_path, make_state(seed=1), step=5)
  save_one(tmp_path, state, step=9)
  before = sorted(tmp_path.rglob("*"))
  expected = make_state(seed=3).params
  params, step = checkpoint.restore_params(tmp_path, None, expected)
  assert step == 9
  assert_trees_equal(params, expected)
  _, step = checkpoint.restore_params(tmp_path, 5, expected)
  assert step == 5
  assert sorted(tmp_path.rglob("*")) == before


def test_parameters_that_do_not_fit_are_refused(tmp_path):
  save_one(tmp_path, make_state())
  wanted = make_state(dtype=jnp.bfloat16).params
  with pytest.raises(ValueError, match="params/attention/w: saved float32"):
    checkpoint.restore_params(tmp_path, None, wanted)
  with pytest.raises(ValueError, match="params/b: .* wanted nothing"):
    checkpoint.restore_params(
      tmp_path, None, {"attention": make_state().params["attention"]}
    )
  with pytest.raises(ValueError, match="no checkpoint in .*elsewhere is whole"):
    checkpoint.restore_params(tmp_path / "elsewhere", None, wanted)
