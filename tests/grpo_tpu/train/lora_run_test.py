"""A run with adapters: they alone are trained, kept and brought back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_tpu.models.gemma3 import lora
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.models.settings import LORA_TARGETS, LoraConfig
from grpo_tpu.rl import optimizer, score, train_state, train_step
from grpo_tpu.rl.settings import PRESETS, OptimizerConfig
from grpo_tpu.rl.train_batch import TrainBatch
from tests.grpo_tpu.checkpoint import checkpointing

pytestmark = pytest.mark.usefixtures("quick_compile")
LORA = LoraConfig(rank=2, alpha=4.0, targets=LORA_TARGETS, init="")
TX = optimizer.make_optimizer(
  OptimizerConfig(
    learning_rate=3e-2,
    schedule="linear",
    warmup_steps=1,
    num_steps=4,
    end_fraction=0.1,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.1,
    max_grad_norm=1.0,
  ),
  is_frozen=lambda path: False,
)


@dataclasses.dataclass(frozen=True)
class Run:
  """Three updates in one go.

  Attributes:
    model: What ran.
    frozen: The parameters under the adapters.
    before: A copy of these from before the first update.
    bundles: What each update learnt from.
    update: The update.
    states: Before each update, and after the last.
    metrics: Of each update.
  """

  model: ForwardConfig
  frozen: dict
  before: dict
  bundles: TrainBatch
  update: object
  states: list[train_state.TrainState]
  metrics: list[dict]


def copied(tree):
  return jax.tree.map(lambda x: np.array(x), tree)


@pytest.fixture(scope="module")
def run(tiny):
  model = ForwardConfig(
    config=tiny.config,
    dtype=jnp.float32,
    remat="none",
    temperature=1.0,
    chunk_size=16,
    train_vision=False,
  )
  rng = np.random.default_rng(1)
  shape = (4, 2, 5)
  bundles = TrainBatch(
    *tiny.prompts(4),
    completion_ids=jnp.asarray(rng.integers(110, 130, shape), jnp.int32),
    completion_mask=jnp.ones(shape, bool),
    advantages=jnp.asarray(rng.normal(0, 1, shape[:2]), jnp.float32),
  )
  reference, _ = score.score_batch(
    model, tiny.params, bundles, num_microbatches=2
  )
  bundles = bundles.replace(ref_per_token_logps=reference)
  update = train_step.make_train_step(
    model,
    TX,
    config=dataclasses.replace(PRESETS["grpo"], beta=0.1),
    num_microbatches=2,
    lora=LORA,
  )
  adapters = jax.tree.map(
    jnp.asarray, lora.initial_adapters(tiny.config, LORA, 0)
  )
  state = train_state.TrainState(
    jnp.int32(0), jnp.int32(0), adapters, TX.init(adapters)
  )
  before, states, metrics = copied(tiny.params), [], []
  for _ in range(3):
    states.append(copied(state))
    state, scalars = update(state, bundles, tiny.params)
    metrics.append(jax.device_get(scalars))
  states.append(copied(state))
  return Run(model, tiny.params, before, bundles, update, states, metrics)


def assert_equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_training_moves_the_adapters_and_not_what_is_under_them(run):
  assert_equal(run.frozen, run.before)
  first, last = run.states[0].params, run.states[-1].params
  for path, change in jax.tree_util.tree_leaves_with_path(
    jax.tree.map(lambda x, y: np.abs(x - y).max(), first, last)
  ):
    assert change > 0, jax.tree_util.keystr(path)


def test_the_first_gradient_is_of_the_second_factors_alone(run):
  """Behind a `B` of zeros no gradient reaches `A`."""
  moments = optax.tree.get(run.states[1].opt_state, "mu")
  for path, moment in jax.tree_util.tree_leaves_with_path(moments):
    is_second = jax.tree_util.keystr(path).endswith("['lora_b']")
    assert moment.any() == is_second, jax.tree_util.keystr(path)


def test_the_reference_is_the_policy_with_its_adapters_off(run):
  """At first they agree to the bit: the KL is 0. Later it is not."""
  adapted = lora.with_adapters(run.frozen, run.states[0].params, LORA)
  scores, _ = score.score_batch(
    run.model, adapted, run.bundles, num_microbatches=2
  )
  assert_equal(scores, run.bundles.ref_per_token_logps)
  kls = [float(metrics["kl"]) for metrics in run.metrics]
  assert abs(kls[0]) < 1e-10 and kls[-1] > 1e-6


def test_a_state_holds_adapters_alone(run):
  """Two moments in fp32 beside each of their numbers, and four scalars."""
  count = sum(x.size for x in jax.tree.leaves(run.states[0].params))
  assert count == sum(
    x.size
    for x in jax.tree.leaves(lora.abstract_adapters(run.model.config, LORA))
  )
  sizes = [x.nbytes for x in jax.tree.leaves(run.states[0])]
  assert sum(sizes) == 3 * 4 * count + 4 * 4
  whole = sum(x.size for x in jax.tree.leaves(run.frozen))
  assert count < whole / 4


def test_a_killed_run_goes_on_to_the_same_bits(run, tmp_path):
  """From a checkpoint that has the adapters in it and nothing of the model."""
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  middle = jax.device_put(run.states[1], place)
  folder = tmp_path / "checkpoints"
  with checkpointing.opened(folder, keep=1) as checkpoints:
    checkpoints.save(1, middle, {})
  with checkpointing.opened(folder, keep=1) as checkpoints:
    restored = checkpoints.restore(middle)
  assert restored is not None
  # Uncommitted as the run's own were, so that nothing is compiled again.
  state = jax.tree.map(jnp.asarray, copied(restored.state))
  for expected in run.states[2:]:
    state, metrics = run.update(state, run.bundles, run.frozen)
    assert_equal(state, expected)
  assert_equal(jax.device_get(metrics), run.metrics[-1])
  names = [
    json.dumps(leaf)
    for path in folder.rglob("_METADATA")
    for leaf in json.loads(path.read_text())["tree_metadata"]
  ]
  kept = [name for name in names if "einsum" in name or "linear" in name]
  assert kept and all("lora_" in name for name in kept)
  assert not any("input_embedding" in name for name in names)
