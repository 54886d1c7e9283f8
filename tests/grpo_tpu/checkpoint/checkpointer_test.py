"""Checkpoints return what was saved, or an error says why not."""

import itertools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines import validation
from grpo_tpu.checkpoint import checkpointer, finite, reader
from grpo_tpu.observability import registry
from grpo_tpu.rl import masters
from tests.grpo_tpu.checkpoint import checkpointing

META = {"fingerprint": "ab12", "position": 96, "config": {"beta": 0.1}}


@flax.struct.dataclass
class State:
  params: dict
  opt_state: optax.OptState
  key: jax.Array
  step: jax.Array


def make_state(mesh=None, *, seed=0, dtype=jnp.float32, width=4):
  """A state with every kind of leaf, sharded over `mesh` if given."""
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
  """The trees are equal in structure, values, dtypes and shardings."""
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
  """Names of the checkpoints; asserts that each has a manifest."""
  names = sorted(each.name for each in path.iterdir() if each.name != "lock")
  folders = [name for name in names if not name.endswith(".json")]
  assert names == sorted(
    name + suffix for name in folders for suffix in ("", ".manifest.json")
  )
  return folders


def save_one(path, state, step=1):
  with checkpointing.opened(path) as checkpoints:
    assert checkpoints.save(step, state, META)


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
  state = make_state(jax.make_mesh((4, 2), ("fsdp", "tensor")))
  save_one(tmp_path, state)
  with checkpointing.opened(tmp_path) as checkpoints:
    restored = checkpoints.restore(state)
  assert restored is not None
  assert_trees_equal(restored.state, state)
  assert (restored.step, restored.meta) == (1, META)
  assert restored.partial_step is None


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
  assert reader.steps(tmp_path) == [3, 6, 8]


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
  assert reader.steps(tmp_path) == [4]


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
  """The optimizer and the other leaves need not be known."""
  state = make_state(jax.make_mesh((4, 2), ("fsdp", "tensor")), seed=3)
  save_one(tmp_path, make_state(seed=1), step=5)
  save_one(tmp_path, state, step=9)
  before = sorted(tmp_path.rglob("*"))
  expected = make_state(seed=3).params
  assert reader.newest_step(tmp_path) == 9
  params = reader.restore_params(tmp_path, 9, expected)
  assert_trees_equal(params, expected)
  params = reader.restore_params(tmp_path, 5, expected)
  assert_trees_equal(params, make_state(seed=1).params)
  assert sorted(tmp_path.rglob("*")) == before


def test_parameters_of_another_run_come_in_the_wanted_types(tmp_path):
  """From masters, where the run has them and float32 is wanted."""
  fine = {"a": {"w": jnp.float32(1.001), "b": jnp.float32(2.003)}}
  rounded = optax.tree.cast(fine, jnp.bfloat16)
  kept = {"a": fine["a"] | {"b": optax.MaskedNode()}}
  opt_state = masters.MastersState(kept, ())
  save_one(tmp_path, {"params": rounded, "opt_state": opt_state})
  got = reader.restore_params(tmp_path, 1, rounded)
  assert_trees_equal(got, rounded)
  got = reader.restore_params(tmp_path, 1, fine)
  b = rounded["a"]["b"].astype(jnp.float32)
  assert_trees_equal(got, {"a": {"w": fine["a"]["w"], "b": b}})


def test_parameters_that_do_not_fit_are_refused(tmp_path):
  save_one(tmp_path, make_state())
  wanted = make_state(width=5).params
  with pytest.raises(ValueError, match=r"params/b: saved bfloat16\[8,4\]"):
    reader.restore_params(tmp_path, 1, wanted)
  with pytest.raises(ValueError, match="params/b: .* wanted nothing"):
    reader.restore_params(
      tmp_path, 1, {"attention": make_state().params["attention"]}
    )
  with pytest.raises(ValueError, match="no checkpoint in .*elsewhere is whole"):
    reader.newest_step(tmp_path / "elsewhere")


def partial_step(updates_done, *, seed=0, mesh=None):
  arrays = {
    "ids": jnp.arange(24, dtype=jnp.int32).reshape(8, 3) + seed,
    "mask": jnp.arange(8) % 3 == 0,
    "images": jnp.full((8, 2, 2, 3), seed, jnp.uint8),
    "logps": jax.random.normal(jax.random.key(seed), (8, 3)),
  }
  if mesh is not None:
    arrays = jax.device_put(arrays, by_rows(mesh))
  record = {"scalars": {"rollout/reward": 0.1 + seed}, "num_batches": 1}
  return reader.PartialStepData(updates_done, arrays, record)


def by_rows(mesh):
  return NamedSharding(mesh, PartitionSpec(("fsdp", "tensor")))


def assert_partial_step(restored, step, wanted):
  assert restored is not None and restored.step == step
  assert restored.partial_step is not None
  assert restored.partial_step.updates_done == wanted.updates_done
  assert restored.partial_step.record == wanted.record
  assert_trees_equal(restored.partial_step.arrays, wanted.arrays)


def test_a_partial_step_is_restored_with_its_arrays(tmp_path):
  """The step before it was saved under the same number."""
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
  partial = partial_step(1, seed=3, mesh=mesh)
  with checkpointing.opened(tmp_path, every_steps=5) as checkpoints:
    assert checkpoints.save(5, make_state(mesh, seed=5), META)
    assert checkpoints.save(
      5, make_state(mesh, seed=6), {}, partial_step=partial
    )
    # The same partial step was saved already.
    assert not checkpoints.save(5, make_state(mesh), {}, partial_step=partial)
  assert names(tmp_path) == ["00000005", "00000005.1"]
  other = jax.make_mesh((2, 4), ("fsdp", "tensor"))
  for wanted in (mesh, other):
    with checkpointing.opened(tmp_path) as checkpoints:
      restored = checkpoints.restore(
        make_state(wanted), partial_step_sharding=by_rows(wanted)
      )
    partial = partial_step(1, seed=3, mesh=wanted)
    assert_partial_step(restored, 5, partial)
    assert_trees_equal(restored.state, make_state(wanted, seed=6))


def test_a_partial_step_is_saved_when_not_due_and_deleted_later(
  tmp_path,
):
  rows = by_rows(jax.make_mesh((8, 1), ("fsdp", "tensor")))
  with checkpointing.opened(tmp_path, every_steps=50) as checkpoints:
    checkpoints.save(0, make_state(), {})
    for updates in (1, 2):
      assert checkpoints.save(
        7, make_state(seed=updates), {}, partial_step=partial_step(updates)
      )
    restored = checkpoints.restore(make_state(), partial_step_sharding=rows)
    assert restored is not None and restored.partial_step is not None
    assert (restored.step, restored.partial_step.updates_done) == (7, 2)
    with pytest.raises(ValueError, match="step 7 is older"):
      checkpoints.save(7, make_state(), {}, partial_step=partial_step(1))
    assert checkpoints.save(8, make_state(seed=8), {}, force=True)
    restored = checkpoints.restore(make_state())
  assert restored is not None
  assert restored.step == 8 and restored.partial_step is None
  assert names(tmp_path) == ["00000000", "00000008"]
  assert reader.steps(tmp_path) == [0, 8]
  assert reader.best_path(tmp_path) is None  # Nothing was scored.


def test_the_best_by_a_metric_outlives_newer_ones(tmp_path):
  """In the same run, in a resumed run, and if the step was not due."""
  settings = {
    "every_steps": 4,
    "keep": 1,
    "best_metric": "eval/accuracy",
    "keep_best": 1,
  }

  def save(checkpoints, step, accuracy):
    return checkpoints.save(
      step, make_state(), {}, metrics={"eval/accuracy": accuracy}
    )

  with checkpointing.opened(tmp_path, **settings) as checkpoints:
    assert save(checkpoints, 1, 0.2)
    assert save(checkpoints, 2, 0.9)
    assert save(checkpoints, 3, jnp.float32(0.5))
    assert checkpoints.save(4, make_state(), {}, metrics={"train/loss": 1.0})
  assert names(tmp_path) == ["00000002", "00000004"]
  assert reader.best_path(tmp_path) == tmp_path / "00000002"
  assert reader.newest_path(tmp_path) == tmp_path / "00000004"
  with checkpointing.opened(tmp_path, **settings) as checkpoints:
    assert not save(checkpoints, 5, float("nan"))
    assert save(checkpoints, 6, 0.8)
  assert names(tmp_path) == ["00000002", "00000006"]
  assert reader.best_path(tmp_path) == tmp_path / "00000002"
  with checkpointing.opened(tmp_path, **settings) as checkpoints:
    assert save(checkpoints, 7, 0.95)
  assert names(tmp_path) == ["00000007"]


def test_scores_by_two_metrics_are_never_compared(tmp_path):
  """A resume may name another metric, or say that less of it is better."""

  def save(step, value, **settings):
    name = settings["best_metric"]
    with checkpointing.opened(tmp_path, keep=1, **settings) as checkpoints:
      assert checkpoints.save(step, make_state(), {}, metrics={name: value})

  save(1, 0.9, best_metric="eval/accuracy")
  save(2, 0.2, best_metric="eval/reward")
  save(3, 0.1, best_metric="eval/reward")
  assert names(tmp_path) == ["00000002", "00000003"]
  assert reader.best_path(tmp_path) == tmp_path / "00000002"
  save(4, 0.3, best_metric="eval/reward", best_mode="min")
  assert names(tmp_path) == ["00000004"]
  assert reader.best_step(tmp_path) == 4


def test_a_run_without_a_best_metric_has_no_best_step(tmp_path):
  with checkpointing.opened(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(), {}, metrics={"eval/accuracy": 1.0})
  with pytest.raises(validation.SettingError, match="checkpoint.best_metric"):
    reader.best_step(tmp_path)


def test_a_step_is_due_once_the_minutes_have_passed(tmp_path, monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(checkpointer.time, "monotonic", lambda: now[0])
  with checkpointing.opened(
    tmp_path, every_steps=100, every_minutes=2.0
  ) as checkpoints:
    saved = []
    for step in range(1, 9):
      now[0] += 50.0
      if checkpoints.save(step, make_state(), {}):
        saved.append(step)
      checkpoints.wait()
  assert saved == [3, 6]


def test_a_number_that_is_not_finite_is_found_wherever_it_lies():
  """On any device, for any sharding of the array."""
  mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
  specs = [(), ("fsdp",), (None, "tensor"), ("fsdp", "tensor"), (None, "fsdp")]
  for spec, dtype in itertools.product(specs, (jnp.float32, jnp.bfloat16)):
    data_sharding = NamedSharding(mesh, PartitionSpec(*spec))
    values = np.linspace(-3, 3, 8 * 64).reshape(8, 64).astype(dtype)
    good = jax.device_put(values, data_sharding)
    other = jax.device_put(values[0], NamedSharding(mesh, PartitionSpec()))
    assert finite.is_finite([other, good])
    for at in ((0, 0), (3, 17), (4, 63), (7, 63)):
      for value in (float("nan"), float("inf"), -float("inf")):
        bad = values.copy()
        bad[at] = value
        assert not finite.is_finite([other, jax.device_put(bad, data_sharding)])
  assert finite.is_finite({"empty": jnp.zeros((0, 3)), "key": jnp.int32(1)})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, value, where):
  good = make_state(jax.make_mesh((4, 2), ("fsdp", "tensor")), seed=1)

  def broken(leaf):
    values = np.array(leaf)
    if leaf.ndim:
      values[3, 1] = value
    return jax.device_put(values, leaf.sharding)

  bad = good.replace(**{where: jax.tree.map(broken, getattr(good, where))})
  with checkpointing.opened(tmp_path, max_failures=3) as checkpoints:
    assert checkpoints.save(1, good, META)
    assert not checkpoints.save(2, bad, META)
    assert not checkpoints.save(3, bad, META, force=True)
    assert (checkpoints.refusals, checkpoints.failures) == (2, 2)
    restored = checkpoints.restore(good)
    with pytest.raises(
      checkpointer.CheckpointError, match="in a row: 3.*not finite"
    ):
      checkpoints.save(4, bad, META)
    assert checkpoints.scalars()["checkpoint/refused_not_finite"] == 3
    # A finite state is saved at once, and resets the count.
    assert checkpoints.save(5, good, META)
  assert restored is not None and restored.step == 1
  assert reader.steps(tmp_path) == [1, 5]


def test_a_run_whose_last_state_was_refused_does_not_end_well(tmp_path):
  bad = {"w": jnp.array([1.0, jnp.nan])}
  with pytest.raises(checkpointer.CheckpointError, match="could not be saved"):
    with checkpointing.opened(tmp_path) as checkpoints:
      checkpoints.save(1, bad, META, force=True)


def test_the_time_that_saves_took_is_reported_once(tmp_path):
  with checkpointing.opened(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(), {})
    assert checkpoints.scalars()["perf/checkpoint_block_seconds"] > 0
    assert checkpoints.scalars()["perf/checkpoint_block_seconds"] == 0
    assert checkpoints.scalars().keys() <= {m.name for m in registry.metrics()}
