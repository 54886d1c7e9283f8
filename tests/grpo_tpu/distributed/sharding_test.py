"""A mesh changes the sharding of arrays and no result."""

import dataclasses
import functools
import itertools
import math
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import decoding, weights
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.rl import train_state, train_step
from grpo_tpu.rl.settings import PRESETS
from grpo_tpu.rl.train_batch import TrainBatch
from grpo_tpu.rollout import engine

pytestmark = pytest.mark.usefixtures("quick_compile")
PROMPTS, NUM_COMPLETIONS, NUM_TOKENS = 8, 2, 5
MESHES = {"fsdp": (1, 8, 1), "fsdp_and_tensor": (1, 4, 2)}
TX = optax.sgd(1.0)  # The change of the parameters is the gradient.


@dataclasses.dataclass(frozen=True)
class Step:
  """The results of one step."""

  completions: engine.Completions
  params: dict
  metrics: dict


def run_step(tiny, place_params, place_batch, mesh=None):
  """Samples and updates, with the given shardings."""
  params = place_params(tiny.params)
  prompts = tiny.prompts(PROMPTS)
  completions, _ = tiny.sampled(
    prompts,
    np.arange(PROMPTS),
    jax.random.key(3),
    mesh=mesh,
    num_completions=NUM_COMPLETIONS,
    max_new_tokens=NUM_TOKENS,
    chunk_tokens=2,
  )
  if mesh:
    assert len(completions.ids.sharding.device_set) == 8
  *prompts, completions, advantages = place_batch(
    [
      *map(np.asarray, prompts),
      jax.device_get(completions),
      np.linspace(-1, 1, PROMPTS * NUM_COMPLETIONS, dtype=np.float32).reshape(
        PROMPTS, NUM_COMPLETIONS
      ),
    ]
  )
  update = train_step.make_train_step(
    ForwardConfig(
      config=tiny.config,
      dtype=jnp.float32,
      remat="full",
      temperature=0.7,
      chunk_size=16,
      train_vision=True,
    ),
    TX,
    config=PRESETS["dapo"],
    num_microbatches=1,
  )
  bundles = TrainBatch(
    *prompts,
    completion_ids=completions.ids,
    completion_mask=completions.mask,
    advantages=advantages,
    sampler_logps=completions.logps,
  )
  params = jax.tree.map(jnp.copy, params)  # The update donates its state.
  state = train_state.TrainState(
    step=jnp.zeros((), jnp.int32),
    position=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=TX.init(params),
  )
  state, metrics = update(state, bundles)
  return Step(completions, state.params, metrics)


@pytest.fixture(scope="module")
def unsharded(tiny):
  return run_step(tiny, lambda x: x, functools.partial(jax.tree.map, jnp.array))


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_a_step_on_a_mesh_equals_one_on_a_single_device(tiny, unsharded, shape):
  mesh = sharding.make_mesh(*shape)
  with jax.set_mesh(mesh):
    actual = run_step(
      tiny,
      lambda x: jax.device_put(x, sharding.param_shardings(mesh, x)),
      functools.partial(sharding.device_put_batch, mesh),
      mesh,
    )
  jax.tree.map(
    np.testing.assert_array_equal,
    (actual.completions.ids, actual.completions.mask),
    (unsharded.completions.ids, unsharded.completions.mask),
  )
  for got, want in (
    (actual.completions.logps, unsharded.completions.logps),
    (actual.params, unsharded.params),
    (actual.metrics, unsharded.metrics),
  ):
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5),
      got,
      want,
    )


def shard_sizes(mesh, tree):
  """The number of elements of a tree, and of its shard on one device."""
  shardings = sharding.param_shardings(mesh, tree)
  whole = held = 0
  for leaf, placement in zip(
    jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True
  ):
    whole += np.prod(leaf.shape)
    held += np.prod(placement.shard_shape(leaf.shape))
  return whole, held


@pytest.mark.parametrize("name", gemma3_config.CONFIGS)
def test_a_device_holds_no_more_than_its_share_of_every_model(name):
  """Fsdp splits all matrices in eight; only small arrays are replicated."""
  tree = weights.abstract_params(gemma3_config.CONFIGS[name], jnp.float32)
  whole, held = shard_sizes(sharding.make_mesh(1, 8, 1), tree)
  # Replicated: norms, biases, and the tower's patches and positions.
  assert held < whole * (1 / 8 + (0.15 if name == "tiny" else 0.003))


def test_tensor_splits_the_decoder_like_fsdp():
  tree = weights.abstract_params(
    gemma3_config.CONFIGS["gemma3_12b"], jnp.float32
  )
  del tree["vision_encoder"], tree["embedder"]["mm_input_projection"]
  whole, held = shard_sizes(sharding.make_mesh(1, 1, 8), tree)
  assert held < whole / 8 * 1.001


def test_moments_have_the_shardings_of_their_parameters(tiny):
  mesh = sharding.make_mesh(1, 4, 2)
  shardings = sharding.param_shardings(mesh, tiny.params)
  state = train_state.TrainState(
    step=jnp.zeros((), jnp.int32),
    position=jnp.zeros((), jnp.int32),
    params=tiny.params,
    opt_state=optax.adam(1e-3).init(tiny.params),
  )
  placed = sharding.param_shardings(mesh, state)
  adam = placed.opt_state[0]
  assert placed.params == adam.mu == adam.nu == shardings
  assert adam.count.spec == placed.step.spec == placed.position.spec == P()


def test_a_key_value_head_that_tensor_does_not_divide_is_replicated(tiny):
  attn = {"attn": {"kv_einsum": jax.ShapeDtypeStruct((6, 2, 1, 16, 8), float)}}
  mesh = sharding.make_mesh(1, 4, 2)
  spec = sharding.param_shardings(mesh, attn)["attn"]["kv_einsum"].spec
  assert spec == P(None, None, None, "fsdp", None)
  attn["attn"]["kv_einsum"] = jax.ShapeDtypeStruct((6, 2, 2, 16, 8), float)
  spec = sharding.param_shardings(mesh, attn)["attn"]["kv_einsum"].spec
  assert spec == P(None, None, "tensor", "fsdp", None)


@pytest.mark.parametrize(
  "path", ["adapter", "q_einsum_adapter", "other_q_einsum"]
)
def test_a_parameter_without_a_rule_is_refused_by_name(path):
  tree = {"layers": {"attn": {path: jnp.zeros((1, 8, 8, 8))}}}
  with pytest.raises(ValueError, match=f"layers/attn/{path}"):
    sharding.param_shardings(sharding.make_mesh(1, 8, 1), tree)


def test_a_size_that_the_mesh_does_not_divide_is_refused_with_its_axis():
  mesh = sharding.make_mesh(1, 4, 2)
  for shape, message in (
    (
      (1, 8, 6),
      r"mesh\.fsdp \(4\) must divide axis 2 of mlp/linear.*of 6: .*=3",
    ),
    (
      (1, 7, 8),
      r"mesh\.tensor \(2\) must divide axis 1 of mlp/linear.*of 7: .*=1",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      sharding.param_shardings(mesh, {"mlp": {"linear": jnp.zeros(shape)}})


def test_a_mesh_of_other_than_all_devices_is_refused_with_the_remedy():
  with pytest.raises(ValueError) as error:
    sharding.make_mesh(2, 2, 1)
  assert str(error.value) == (
    "mesh.replica * mesh.fsdp * mesh.tensor (2 * 2 * 1) must equal the number "
    "of devices (8); set mesh.replica=1 mesh.fsdp=8 mesh.tensor=1."
  )


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize(
  "shape", [(1, 4, 4), (1, 8, 4), (4, 1, 1), (3, 5, 7), (1, 10**9, 10**9)]
)
def test_the_remedy_for_a_mesh_leads_out_in_one_step(shape, slices):
  """From the mesh of a large slice to any fewer devices."""
  for count in (2, 6, 8):
    devices = fake_devices(count, 1, slices=slices)
    with pytest.raises(ValueError) as error:
      sharding.make_mesh(*shape, devices=devices)
    axes = dict(re.findall(r"mesh\.(\w+)=(\d+)", str(error.value)))
    axes = {name: int(size) for name, size in axes.items()}
    mesh = sharding.make_mesh(**axes, devices=devices)
    assert mesh.size == count


def test_a_huge_axis_is_refused_at_once():
  mesh = sharding.abstract_mesh(1, 1, 10**12)
  with pytest.raises(ValueError, match=r"nearest below is mesh\.tensor=6\."):
    sharding.param_shardings(mesh, {"mlp": {"linear": jnp.zeros((1, 6, 6))}})


def test_a_batch_is_unchanged_after_a_round_trip_through_the_mesh():
  mesh = sharding.make_mesh(2, 2, 2)
  batch = {
    "ids": np.arange(24, dtype=np.int32).reshape(8, 3),
    "images": np.zeros((8, 0, 4, 4, 3), np.uint8),
  }
  placed = sharding.device_put_batch(mesh, batch)
  assert placed["ids"].sharding.shard_shape((8, 3)) == (2, 3)
  back = sharding.local_rows(mesh, placed)
  jax.tree.map(np.testing.assert_array_equal, back, batch)
  assert sharding.data_shards(mesh) == ((0, 1, 2, 3), 4)
  jax.tree.map(
    np.testing.assert_array_equal, sharding.all_rows(mesh, batch), batch
  )


@dataclasses.dataclass(frozen=True)
class Device:
  """The fields of a device that a mesh needs."""

  id: int
  process_index: int
  slice_index: int = 0
  platform: str = "cpu"
  device_kind: str = "fake"


def fake_devices(hosts, each, slices=1):
  return [
    Device(i, i // each, i // each * slices // hosts)
    for i in range(hosts * each)
  ]


LAYOUTS = [
  (hosts, each, shape)
  for hosts in (1, 2, 3, 4, 6, 8)
  for each in (1, 2, 4)
  for shape in itertools.product((1, 2, 3, 4), (1, 2, 4, 8), (1, 2, 4, 8))
  if math.prod(shape) == hosts * each
]


@pytest.mark.parametrize("order", ["as_numbered", "shuffled"])
def test_a_process_reads_what_its_devices_hold(order):
  """This holds for any order of devices and any axes across the hosts."""
  assert len(LAYOUTS) > 40
  for hosts, each, shape in LAYOUTS:
    devices = fake_devices(hosts, each)
    if order == "shuffled":
      random.Random(f"{hosts} {each} {shape}").shuffle(devices)
    layout = np.array(devices).reshape(shape)
    mesh = jax.sharding.Mesh(layout, sharding.AXES)
    num_rows = 3 * shape[0] * shape[1]
    # The rows that JAX expects on each device.
    held = sharding.batch_sharding(mesh).devices_indices_map((num_rows, 5))
    for process in range(hosts):
      wanted = {
        row
        for device, index in held.items()
        if device.process_index == process
        for row in range(num_rows)[index[0]]
      }
      rows = sharding.process_rows(mesh, num_rows, process)
      assert rows == sorted(wanted), (hosts, each, shape, order)


def test_hosts_that_share_a_tensor_axis_read_the_same_rows():
  layout = np.array(fake_devices(4, 2)).reshape(1, 2, 4)
  mesh = jax.sharding.Mesh(layout, sharding.AXES)
  shards = [sharding.data_shards(mesh, process) for process in range(4)]
  assert shards == [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]


def test_the_shards_of_a_host_need_not_be_adjacent():
  """On a torus the chips of a host form a square."""
  a, b, c, d = (fake_devices(2, 2)[i] for i in (0, 1, 2, 3))
  mesh = jax.sharding.Mesh(
    np.array([a, c, b, d]).reshape(1, 4, 1), sharding.AXES
  )
  assert sharding.data_shards(mesh, 0) == ((0, 2), 4)
  assert sharding.process_rows(mesh, 8, 1) == [2, 3, 6, 7]


@pytest.mark.parametrize("shape", [(2, 4, 1), (4, 2, 1), (2, 2, 2)])
def test_only_replica_spans_slices(shape):
  devices = fake_devices(4, 2, slices=2)
  mesh = sharding.make_mesh(*shape, devices=devices)
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  # The copies of one slice are adjacent, and no copy spans two slices.
  half = shape[0] // 2
  assert (slices[:half] == 0).all() and (slices[half:] == 1).all()
  assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_a_replica_axis_smaller_than_the_slices_is_refused_with_the_remedy():
  with pytest.raises(ValueError) as error:
    sharding.make_mesh(1, 8, 1, devices=fake_devices(4, 2, slices=2))
  assert str(error.value) == (
    "mesh.replica (1) must be a multiple of the number of slices (2), because "
    "no other axis may span the network between them; set mesh.replica=2 "
    "mesh.fsdp=4 mesh.tensor=1."
  )


def test_a_batch_is_sharded_over_a_mesh_in_any_order():
  """The mesh has the devices in reverse order."""
  devices = np.array(jax.devices()[::-1]).reshape(2, 2, 2)
  mesh = jax.sharding.Mesh(devices, sharding.AXES)
  batch = np.arange(24, dtype=np.int32).reshape(8, 3)
  placed = sharding.device_put_batch(mesh, batch)
  np.testing.assert_array_equal(placed, batch)
  np.testing.assert_array_equal(sharding.local_rows(mesh, placed), batch)


def test_activations_have_the_shardings_of_their_table():
  mesh = sharding.make_mesh(1, 4, 2)

  @jax.jit
  def act(heads, one_head, few):
    return (
      sharding.constrain_activation(heads, "heads"),
      sharding.constrain_activation(one_head, "heads"),
      sharding.constrain_activation(few, "bundles"),
    )

  arrays = (
    jnp.ones((8, 1, 3, 2, 4)),
    jnp.ones((8, 1, 3, 1, 4)),
    jnp.ones((2, 3)),
  )
  with jax.set_mesh(mesh):
    heads, one_head, few = act(*arrays)
  shapes = [x.sharding.shard_shape(x.shape) for x in (heads, one_head, few)]
  assert shapes == [(2, 1, 3, 1, 4), (2, 1, 3, 1, 4), (2, 3)]
  # Nothing changes without a mesh.
  assert sharding.constrain_activation(arrays[0], "heads") is arrays[0]


def test_every_cache_has_a_rule_and_an_unknown_one_is_refused():
  """Bundles split over the data axes, and heads over tensor if it divides."""
  mesh = sharding.make_mesh(2, 2, 2)
  for field in dataclasses.fields(decoding.Cache):
    shape = (3, 8, 2, 5, 4) if "prompt" in field.name else (3, 8, 6, 2, 5, 4)
    for heads, tensor in ((2, 2), (1, 1)):
      placement = jax.sharding.NamedSharding(
        mesh, sharding.cache_spec(mesh, field.name, heads)
      )
      sizes = list(shape)
      sizes[1], sizes[-3] = 2, 2 // tensor
      assert placement.shard_shape(shape) == tuple(sizes), (field.name, heads)
  with pytest.raises(ValueError, match="matches the cache latent_k"):
    sharding.cache_spec(mesh, "latent_k", 2)


def test_an_update_keeps_the_shardings_of_a_state(tiny):
  """Otherwise the next update would compile again."""
  mesh = sharding.make_mesh(1, 4, 2)
  shardings = sharding.param_shardings(mesh, tiny.params)
  with jax.set_mesh(mesh):
    placed = run_step(
      tiny,
      lambda x: jax.device_put(x, shardings),
      functools.partial(sharding.device_put_batch, mesh),
      mesh,
    ).params
  jax.tree.map(
    lambda x, placement: (
      x.sharding.is_equivalent_to(placement, x.ndim) or pytest.fail()
    ),
    placed,
    shardings,
  )
