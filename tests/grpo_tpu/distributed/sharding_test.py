"""A mesh changes where arrays lie, and nothing that is computed."""

import dataclasses
import functools
import itertools
import math
import random

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
  """What one step made of the model."""

  completions: engine.Completions
  params: dict
  metrics: dict


def step_of(tiny, place_params, place_batch, mesh=None):
  """Samples and updates, with the arrays where they are placed."""
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
  params = jax.tree.map(jnp.copy, params)  # The update eats its state.
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
  return step_of(tiny, lambda x: x, functools.partial(jax.tree.map, jnp.array))


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES.keys())
def test_a_step_on_a_mesh_equals_one_on_a_single_device(tiny, unsharded, shape):
  mesh = sharding.make_mesh(*shape)
  with jax.set_mesh(mesh):
    actual = step_of(
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
  """Elements of a tree, and of what one device holds of it."""
  places = sharding.param_shardings(mesh, tree)
  whole = held = 0
  for leaf, place in zip(
    jax.tree.leaves(tree), jax.tree.leaves(places), strict=True
  ):
    whole += np.prod(leaf.shape)
    held += np.prod(place.shard_shape(leaf.shape))
  return whole, held


@pytest.mark.parametrize("name", gemma3_config.CONFIGS)
def test_a_device_holds_no_more_than_its_share_of_every_model(name):
  """An eighth of all matrices under fsdp; what is replicated is small."""
  tree = weights.abstract_params(gemma3_config.CONFIGS[name], jnp.float32)
  whole, held = shard_sizes(sharding.make_mesh(1, 8, 1), tree)
  # Norms and biases, and of the tower the patches and positions.
  assert held < whole * (1 / 8 + (0.15 if name == "tiny" else 0.003))


def test_tensor_shares_cut_the_decoder_as_fsdp_shares_do():
  tree = weights.abstract_params(
    gemma3_config.CONFIGS["gemma3_12b"], jnp.float32
  )
  del tree["vision_encoder"], tree["embedder"]["mm_input_projection"]
  whole, held = shard_sizes(sharding.make_mesh(1, 1, 8), tree)
  assert held < whole / 8 * 1.001


def test_moments_lie_where_their_parameters_do(tiny):
  mesh = sharding.make_mesh(1, 4, 2)
  places = sharding.param_shardings(mesh, tiny.params)
  state = train_state.TrainState(
    step=jnp.zeros((), jnp.int32),
    position=jnp.zeros((), jnp.int32),
    params=tiny.params,
    opt_state=optax.adam(1e-3).init(tiny.params),
  )
  placed = sharding.param_shardings(mesh, state)
  adam = placed.opt_state[0]
  assert placed.params == adam.mu == adam.nu == places
  assert adam.count.spec == placed.step.spec == placed.position.spec == P()


def test_a_key_value_head_that_tensor_does_not_divide_is_copied(tiny):
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
def test_a_parameter_that_no_rule_knows_is_refused_by_name(path):
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
    "of devices (8); set mesh.fsdp=8 to shard over all of them."
  )


def test_a_batch_comes_back_from_the_mesh_as_it_went():
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
  """As much of a device as a mesh asks for."""

  id: int
  process_index: int
  slice_index: int = 0
  platform: str = "cpu"
  device_kind: str = "pretended"


def pretended(hosts, each, slices=1):
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
  """Whatever the order of devices, and whichever axes span the hosts."""
  assert len(LAYOUTS) > 40
  for hosts, each, shape in LAYOUTS:
    devices = pretended(hosts, each)
    if order == "shuffled":
      random.Random(f"{hosts} {each} {shape}").shuffle(devices)
    layout = np.array(devices).reshape(shape)
    mesh = jax.sharding.Mesh(layout, sharding.AXES)
    num_rows = 3 * shape[0] * shape[1]
    # What JAX itself wants on each device.
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


def test_hosts_that_tensor_spans_read_the_same_rows():
  layout = np.array(pretended(4, 2)).reshape(1, 2, 4)
  mesh = jax.sharding.Mesh(layout, sharding.AXES)
  shards = [sharding.data_shards(mesh, process) for process in range(4)]
  assert shards == [((0,), 2), ((0,), 2), ((1,), 2), ((1,), 2)]


def test_the_parts_of_a_host_need_not_stand_side_by_side():
  """As on a torus, where a host's chips are a square."""
  a, b, c, d = (pretended(2, 2)[i] for i in (0, 1, 2, 3))
  mesh = jax.sharding.Mesh(
    np.array([a, c, b, d]).reshape(1, 4, 1), sharding.AXES
  )
  assert sharding.data_shards(mesh, 0) == ((0, 2), 4)
  assert sharding.process_rows(mesh, 8, 1) == [2, 3, 6, 7]


@pytest.mark.parametrize("shape", [(2, 4, 1), (4, 2, 1), (2, 2, 2)])
def test_only_replica_goes_from_slice_to_slice(shape):
  devices = pretended(4, 2, slices=2)
  mesh = sharding.make_mesh(*shape, devices=devices)
  slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
  # Copies of one slice stand together, and no slice is in two copies.
  half = shape[0] // 2
  assert (slices[:half] == 0).all() and (slices[half:] == 1).all()
  assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_slices_that_replica_does_not_cover_are_refused_with_the_remedy():
  with pytest.raises(ValueError) as error:
    sharding.make_mesh(1, 8, 1, devices=pretended(4, 2, slices=2))
  assert str(error.value) == (
    "mesh.replica (1) must be a multiple of the number of slices (2), because "
    "no other axis may span the network between them; set mesh.replica=2."
  )


def test_a_batch_goes_to_its_places_on_a_mesh_in_any_order():
  """The mesh of the same devices the other way round."""
  devices = np.array(jax.devices()[::-1]).reshape(2, 2, 2)
  mesh = jax.sharding.Mesh(devices, sharding.AXES)
  batch = np.arange(24, dtype=np.int32).reshape(8, 3)
  placed = sharding.device_put_batch(mesh, batch)
  np.testing.assert_array_equal(placed, batch)
  np.testing.assert_array_equal(sharding.local_rows(mesh, placed), batch)


def test_activations_lie_where_their_table_says():
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
  # Without a mesh there is nowhere else to be.
  assert sharding.constrain_activation(arrays[0], "heads") is arrays[0]


def test_every_cache_lies_by_a_rule_and_one_that_none_knows_is_refused():
  """Bundles over the data axes, key-value heads over tensor if it divides."""
  mesh = sharding.make_mesh(2, 2, 2)
  for field in dataclasses.fields(decoding.Cache):
    shape = (3, 8, 2, 5, 4) if "prompt" in field.name else (3, 8, 6, 2, 5, 4)
    for heads, tensor in ((2, 2), (1, 1)):
      place = jax.sharding.NamedSharding(
        mesh, sharding.cache_spec(mesh, field.name, heads)
      )
      sizes = list(shape)
      sizes[1], sizes[-3] = 2, 2 // tensor
      assert place.shard_shape(shape) == tuple(sizes), (field.name, heads)
  with pytest.raises(ValueError, match="matches the cache latent_k"):
    sharding.cache_spec(mesh, "latent_k", 2)


def test_an_update_leaves_a_state_where_it_was(tiny):
  """Or the next would be another program, and a checkpoint another layout."""
  mesh = sharding.make_mesh(1, 4, 2)
  places = sharding.param_shardings(mesh, tiny.params)
  with jax.set_mesh(mesh):
    placed = step_of(
      tiny,
      lambda x: jax.device_put(x, places),
      functools.partial(sharding.device_put_batch, mesh),
      mesh,
    ).params
  jax.tree.map(
    lambda x, place: (
      x.sharding.is_equivalent_to(place, x.ndim) or pytest.fail()
    ),
    placed,
    places,
  )
