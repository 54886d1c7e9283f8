"""Adapters start at zero, and act as the merged matrices would."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.distributed import sharding
from grpo_tpu.models import logprobs
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import decoding, lora, text, weights
from grpo_tpu.models.settings import LORA_TARGETS, LoraConfig
from grpo_tpu.rl.train_batch import TrainBatch

pytestmark = pytest.mark.usefixtures("quick_compile")
LORA = LoraConfig(rank=3, alpha=5.0, targets=LORA_TARGETS, init="")
# Of the tiny model: layers 6, D 16, F 24, Q 2, K 1, H 8, width 16.
SHAPES = {
  "q": ("layers/attn/q_einsum", (6, 16, 3), (6, 3, 2, 8)),
  "kv": ("layers/attn/kv_einsum", (6, 2, 16, 3), (6, 2, 3, 1, 8)),
  "output": ("layers/attn/attn_vec_einsum", (6, 2, 8, 3), (6, 3, 16)),
  "gating": ("layers/mlp/gating_einsum", (6, 2, 16, 3), (6, 2, 3, 24)),
  "linear": ("layers/mlp/linear", (6, 24, 3), (6, 3, 16)),
  "projector": ("embedder/mm_input_projection", (16, 3), (3, 16)),
}


def by_path(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def random_adapters(config, settings=LORA, seed=0):
  """Adapters with two random factors, so that they change something."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32),
    lora.abstract_adapters(config, settings),
  )


def slow_change(name, a, b, scale):
  """`scale * A B` by loops over flat matrices, as in the paper."""

  def flat(a, b):
    return scale * a.reshape(-1, 3).astype(float) @ b.reshape(3, -1)

  if name == "projector":
    return flat(a, b)
  stacked = []
  for a_layer, b_layer in zip(a, b, strict=True):
    if name in ("kv", "gating"):
      pairs = zip(a_layer, b_layer, strict=True)
      stacked.append(np.stack([flat(*pair) for pair in pairs]))
    else:
      stacked.append(flat(a_layer, b_layer))
  change = np.stack(stacked)
  # [.., in, out] with heads and hidden units where our weights have them.
  match name:
    case "q":
      return change.reshape(6, 16, 2, 8).transpose(0, 2, 1, 3)
    case "kv":
      return change.reshape(6, 2, 16, 1, 8).transpose(0, 1, 3, 2, 4)
    case "output":
      return change.reshape(6, 2, 8, 16)
    case "gating":
      return change.transpose(0, 1, 3, 2)
  return change


def bundles_of(tiny, num_prompts=3):
  rng = np.random.default_rng(7)
  ids = rng.integers(110, 130, (num_prompts, 2, 5))
  return TrainBatch(
    *tiny.prompts(num_prompts),
    completion_ids=jnp.asarray(ids, jnp.int32),
    completion_mask=jnp.ones(ids.shape, bool),
  )


@functools.partial(jax.jit, static_argnums=0)
def states_of(config, params, bundles):
  return text.bundle_states(
    config,
    params,
    bundles.prompt_ids,
    bundles.prompt_length,
    bundles.images,
    bundles.completion_ids,
    dtype=jnp.float32,
    remat="none",
  )


def logits_of(tiny, params, bundles):
  return logprobs.output_logits(
    states_of(tiny.config, params, bundles),
    tiny.params["embedder"]["input_embedding"],
    temperature=1.0,
  )


@pytest.fixture(scope="module")
def adapters(tiny):
  return random_adapters(tiny.config)


@pytest.mark.parametrize("name", LORA_TARGETS)
def test_a_target_has_two_factors_of_its_rank(tiny, name):
  settings = dataclasses.replace(LORA, targets=(name,))
  path, a, b = SHAPES[name]
  tree = lora.abstract_adapters(tiny.config, settings)
  assert {k: v.shape for k, v in by_path_of_shapes(tree).items()} == {
    f"{path}/lora_a": a,
    f"{path}/lora_b": b,
  }
  assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def by_path_of_shapes(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_an_adapter_starts_at_zero_and_depends_on_path_and_seed(tiny):
  first, again = (
    by_path(lora.initial_adapters(tiny.config, LORA, 5)) for _ in range(2)
  )
  other = by_path(lora.initial_adapters(tiny.config, LORA, 6))
  # What else is adapted changes nothing for the queries.
  alone = dataclasses.replace(LORA, targets=("q",))
  alone = by_path(lora.initial_adapters(tiny.config, alone, 5))
  for name, value in first.items():
    np.testing.assert_array_equal(value, again[name])
    assert value.any() == other[name].any() == name.endswith("lora_a")
    assert (value != other[name]).any() == name.endswith("lora_a")
  for name, value in alone.items():
    np.testing.assert_array_equal(value, first[name])
  a = first["layers/attn/q_einsum/lora_a"]
  assert not np.array_equal(a, first["layers/mlp/gating_einsum/lora_a"][:, 0])


def test_the_first_factor_has_variance_one_over_what_is_summed():
  config = dataclasses.replace(
    gemma3_config.CONFIGS["gemma3_270m"], num_layers=2
  )
  settings = dataclasses.replace(LORA, rank=16)
  drawn = by_path(lora.initial_adapters(config, settings, 0))
  for path, summed in {
    "layers/attn/q_einsum": 640,
    "layers/attn/kv_einsum": 640,
    "layers/attn/attn_vec_einsum": 4 * 256,
    "layers/mlp/linear": 2048,
  }.items():
    std = drawn[f"{path}/lora_a"].std()
    assert std * math.sqrt(summed) == pytest.approx(1, abs=0.03)


def test_initial_adapters_change_no_bit_of_the_logits(tiny):
  bundles = bundles_of(tiny)
  fresh = lora.initial_adapters(tiny.config, LORA, 0)
  np.testing.assert_array_equal(
    logits_of(tiny, lora.with_adapters(tiny.params, fresh, LORA), bundles),
    logits_of(tiny, tiny.params, bundles),
  )


@pytest.mark.parametrize("name", LORA_TARGETS)
def test_a_merged_weight_includes_the_product_of_the_factors(
  tiny, adapters, name
):
  """The other weights do not change, to the bit."""
  path, _, _ = SHAPES[name]
  before, factors = by_path(tiny.params), by_path(adapters)
  after = by_path(
    lora.merge_adapters(lora.with_adapters(tiny.params, adapters, LORA))
  )
  change = slow_change(
    name, factors[f"{path}/lora_a"], factors[f"{path}/lora_b"], 5 / 3
  )
  np.testing.assert_allclose(
    after[path], before[path] + change, rtol=1e-5, atol=1e-5
  )
  assert after.keys() == before.keys()
  adapted = {path for path, _, _ in SHAPES.values()}
  for other in before.keys() - adapted:
    np.testing.assert_array_equal(after[other], before[other])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_merged_weight_is_the_exact_sum_rounded_once(tiny, dtype):
  """Two adapters on one another, against float64: in fp32 nothing is lost."""
  base = jax.tree.map(lambda x: x.astype(dtype), tiny.params)
  params, before = base, by_path(base)
  changes = {path: 0.0 for path, _, _ in SHAPES.values()}
  for seed in (1, 2):
    adapters = random_adapters(tiny.config, seed=seed)
    params = lora.with_adapters(params, adapters, LORA)
    factors = by_path(adapters)
    for name, (path, _, _) in SHAPES.items():
      a, b = (factors[f"{path}/lora_{x}"] for x in "ab")
      changes[path] = changes[path] + slow_change(name, a, b, 5 / 3)
  merged = by_path(lora.merge_adapters(params))
  for path, change in changes.items():
    assert merged[path].dtype == dtype
    weight = np.float64(before[path])

    def error(rounded, weight=weight, change=change):
      gap = np.float64(rounded) - weight - change
      return np.linalg.norm(gap) / np.linalg.norm(change)

    least = error((weight + change).astype(dtype))
    assert error(merged[path]) < (
      1e-6 if dtype == jnp.float32 else 1.01 * least
    )


def test_adapters_on_adapters_act_as_both(tiny):
  """A run that starts from another's adapters has them in its frozen base."""
  bundles = bundles_of(tiny)
  params = tiny.params
  for seed in (1, 2):
    params = lora.with_adapters(
      params, random_adapters(tiny.config, seed=seed), LORA
    )
  np.testing.assert_allclose(
    logits_of(tiny, params, bundles),
    logits_of(tiny, lora.merge_adapters(params), bundles),
    rtol=1e-4,
    atol=1e-4,
  )


def test_adapted_logits_are_those_of_the_merged_weights(tiny, adapters):
  bundles = bundles_of(tiny)
  actual = logits_of(
    tiny, lora.with_adapters(tiny.params, adapters, LORA), bundles
  )
  merged = lora.merge_adapters(lora.with_adapters(tiny.params, adapters, LORA))
  expected = logits_of(tiny, merged, bundles)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
  base = logits_of(tiny, tiny.params, bundles)
  assert jnp.abs(expected - base).max() > 0.1


def test_decoding_reads_the_adapters_as_scoring_does(tiny, adapters):
  """The state of the prompt, and that after a token from the cache."""
  bundles = bundles_of(tiny)
  params = lora.with_adapters(tiny.params, adapters, LORA)
  expected = states_of(tiny.config, params, bundles)
  prefill = jax.jit(
    decoding.prefill,
    static_argnames=("config", "num_completions", "max_new_tokens", "dtype"),
  )
  state, cache = prefill(
    tiny.config,
    params,
    bundles.prompt_ids,
    bundles.prompt_length,
    bundles.images,
    num_completions=2,
    max_new_tokens=5,
    dtype=jnp.float32,
  )
  np.testing.assert_allclose(state, expected[:, 0, 0], rtol=1e-4, atol=1e-5)
  decode = jax.jit(decoding.decode, static_argnames=("config", "dtype"))
  after, _ = decode(
    tiny.config,
    params,
    cache,
    bundles.prompt_length,
    bundles.completion_ids[:, :, 0],
    jnp.int32(0),
    dtype=jnp.float32,
  )
  np.testing.assert_allclose(after, expected[:, :, 1], rtol=1e-4, atol=1e-5)


def test_gradients_are_the_merged_weights_by_the_chain_rule(tiny, adapters):
  """`dA = s dW B'` and `dB = s A' dW`, by the chain rule."""
  bundles = bundles_of(tiny)
  probe = np.random.default_rng(3).normal(0, 1, (3, 2, 5, 16))

  def loss(params):
    states = states_of(tiny.config, params, bundles)
    return jnp.sum(states * jnp.asarray(probe, jnp.float32))

  @jax.jit
  def of_adapters(params, adapters):
    return jax.grad(lambda x: loss(lora.with_adapters(params, x, LORA)))(
      adapters
    )

  actual = by_path(of_adapters(tiny.params, adapters))
  merged = lora.merge_adapters(lora.with_adapters(tiny.params, adapters, LORA))
  through = by_path(jax.jit(jax.grad(loss))(merged))
  factors, scale = by_path(adapters), 5 / 3
  # The linear map of A alone, and of B alone, has its matrix in its values at
  # unit vectors; here by the axes that the two share with the weight.
  equations = {
    "q": ("lqdh,lrqh->ldr", "lqdh,ldr->lrqh"),
    "kv": ("lnkdh,lnrkh->lndr", "lnkdh,lndr->lnrkh"),
    "output": ("lqhd,lrd->lqhr", "lqhd,lqhr->lrd"),
    "gating": ("lnfd,lnrf->lndr", "lnfd,lndr->lnrf"),
    "linear": ("lfd,lrd->lfr", "lfd,lfr->lrd"),
    "projector": ("wd,rd->wr", "wd,wr->rd"),
  }
  for name, (path, _, _) in SHAPES.items():
    to_a, to_b = equations[name]
    a, b = factors[f"{path}/lora_a"], factors[f"{path}/lora_b"]
    for key, expected in (
      ("lora_a", scale * np.einsum(to_a, through[path], b)),
      ("lora_b", scale * np.einsum(to_b, through[path], a)),
    ):
      error = np.abs(actual[f"{path}/{key}"] - expected).max()
      # The two round their sums in other orders: 2.1e-5 apart at most.
      assert error < 3e-5 * np.abs(expected).max(), (name, key)


@pytest.mark.parametrize(
  "name", [name for name, c in gemma3_config.CONFIGS.items() if name != "tiny"]
)
def test_adapters_are_sharded_like_their_weights_on_every_mesh(name):
  """Sharded like the weight along each axis that they share."""
  config = gemma3_config.CONFIGS[name]
  params = weights.abstract_params(config, jnp.float32)
  tree = lora.abstract_adapters(config, dataclasses.replace(LORA, rank=8))
  for shape in ((1, 8, 1), (1, 4, 2), (2, 2, 2)):
    mesh = sharding.make_mesh(*shape)
    cut = by_path_of_shapes(sharding.param_shardings(mesh, params))
    axes = {
      "q_einsum": "lqdh", "kv_einsum": "lnkdh", "attn_vec_einsum": "lqhd",
      "gating_einsum": "lnfd", "linear": "lfd", "mm_input_projection": "wd",
    }  # fmt: skip
    factors = {
      "q_einsum": ("ldr", "lrqh"), "kv_einsum": ("lndr", "lnrkh"),
      "attn_vec_einsum": ("lqhr", "lrd"), "gating_einsum": ("lndr", "lnrf"),
      "linear": ("lfr", "lrd"), "mm_input_projection": ("wr", "rd"),
    }  # fmt: skip
    for path, place in by_path_of_shapes(
      sharding.param_shardings(mesh, tree)
    ).items():
      weight, _, factor = path.rpartition("/")
      leaf = weight.rpartition("/")[2]
      of_weight = dict(zip(axes[leaf], cut[weight].spec, strict=False))
      letters = factors[leaf][factor == "lora_b"]
      spec = (*place.spec, *[None] * (len(letters) - len(place.spec)))
      assert spec == tuple(of_weight.get(axis) for axis in letters), path


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (
      {"rank": -1},
      r"model\.lora\.rank \(-1\) must be at least 0.*set model\.lora\.rank",
    ),
    ({"alpha": 0.0}, r"model\.lora\.alpha \(0\.0\) must be above 0"),
    ({"alpha": math.inf}, r"model\.lora\.alpha \(inf\) must"),
    ({"alpha": math.nan}, r"model\.lora\.alpha \(nan\) must"),
    ({"targets": ()}, r"model\.lora\.targets \(\(\)\) must hold at least one"),
    ({"targets": ("q", "k")}, r"targets \(\('q', 'k'\)\) must.*q, kv, output"),
    ({"targets": ("q", "q")}, r"targets.*each once"),
  ],
)
def test_a_setting_that_breaks_its_rule_is_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(LORA, **settings)


def test_a_text_model_has_no_projector_to_adapt(tiny):
  config = dataclasses.replace(tiny.config, vision=None)
  assert "embedder" not in lora.abstract_adapters(config, LORA)
  with pytest.raises(ValueError, match=r"targets \(\('projector',\)\) must"):
    lora.abstract_adapters(
      config, dataclasses.replace(LORA, targets=("projector",))
    )
