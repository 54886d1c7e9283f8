"""The decoder against the gemma library, and bundles against separate rows."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.models import logprobs
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import text, vision, weights
from grpo_tpu.models.settings import REMAT_POLICIES
from tests.grpo_tpu.models.gemma3 import float64_twin, one_device, whole_rows

SOFT = GEMMA3.image_placeholder
VOCAB = 300
# Windows shorter than a prompt, several key-value heads, and layers on either
# side of a global one.
CONFIG = gemma3_config.ModelConfig(
  vocab_size=VOCAB,
  num_layers=7,
  embed_dim=32,
  hidden_dim=48,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  sliding_window=6,
  query_scale=16**-0.5,
  local_rope_base=10_000.0,
  global_rope_base=1_000_000.0,
  global_rope_factor=8.0,
  vision=gemma3_config.VisionConfig(
    image_size=32,
    patch_size=8,
    width=32,
    depth=2,
    mlp_dim=64,
    num_heads=2,
    soft_tokens=4,
  ),
)


def random_params(config, seed=0, std=0.2):
  """Random leaves, norms included, so that no factor goes unnoticed."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(
      rng.normal(0, std, x.shape) + (x if x.ndim < 3 else 0), x.dtype
    ),
    weights.random_params(config, seed, jnp.float32),
  )


def image_block():
  """The library's ids of one image; it clamps ids to the vocabulary."""
  top = VOCAB - 1
  return [108, top, *[SOFT] * 4, top, 108]


def library_logits(config, params, ids, images):
  """Logits of the `gemma` library at text positions."""
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from gemma import gm
    from gemma.gm.nn.vision import _vision, _vision_utils

    vision = config.vision
    tower = _vision.SigLiPFromPatches(
      siglip_encoder=_vision_utils.ViTModel(
        patch_size=(vision.patch_size, vision.patch_size),
        width=vision.width,
        depth=vision.depth,
        mlp_dim=vision.mlp_dim,
        num_heads=vision.num_heads,
      ),
      siglip_exit=_vision.VisionExit(output_length=vision.soft_tokens),
      num_mm_tokens_per_image_prepool=(vision.image_size // vision.patch_size)
      ** 2,
      num_mm_tokens_per_image=vision.soft_tokens,
      image_height=vision.image_size,
      image_width=vision.image_size,
    )
    library = gm.nn.config
    model = gm.nn.Transformer(
      config=library.TransformerConfig(
        num_embed=config.vocab_size,
        embed_dim=config.embed_dim,
        hidden_dim=config.hidden_dim,
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        num_kv_heads=config.num_kv_heads,
        final_logit_softcap=None,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        use_qk_norm=True,
        attention_types=library.make_attention_layers_types(
          library.GEMMA3_ATTENTION_PATTERN, num_layers=config.num_layers
        ),
        sliding_window_size=config.sliding_window,
        transpose_gating_einsum=True,
        local_base_frequency=10_000,
        global_base_frequency=1_000_000,
        global_scale_factor=config.global_rope_factor,
        vision_encoder=tower,
      ),
      dtype=jnp.float32,
    )
    with jax.numpy_rank_promotion("allow"):
      return model.apply(
        {"params": library_params(config, params)}, ids, images=images
      ).logits


def library_params(config, params):
  """Our stacked tree, unstacked under the library's names."""

  def layer(i):
    p = jax.tree.map(lambda x: x[i], params["layers"])
    attn = p["attn"]
    return {
      "pre_attention_norm": p["pre_attention_norm"],
      "post_attention_norm": p["post_attention_norm"],
      "pre_ffw_norm": p["pre_ffw_norm"],
      "post_ffw_norm": p["post_ffw_norm"],
      "attn": {
        "q_einsum": {"w": attn["q_einsum"]},
        "kv_einsum": {"w": attn["kv_einsum"]},
        "attn_vec_einsum": {"w": attn["attn_vec_einsum"]},
        "_query_norm": attn["query_norm"],
        "_key_norm": attn["key_norm"],
      },
      "mlp": p["mlp"],
    }

  def encoder_block(i):
    p = jax.tree.map(lambda x: x[i], params["vision_encoder"]["layers"])
    return {
      "LayerNorm_0": p["attention_norm"],
      "MultiHeadDotProductAttention_0": {
        name: p[name] for name in ("query", "key", "value", "out")
      },
      "LayerNorm_1": p["mlp_norm"],
      "MlpBlock_0": {"Dense_0": p["mlp_in"], "Dense_1": p["mlp_out"]},
    }

  vision, embedder = params["vision_encoder"], params["embedder"]
  return {
    "embedder": {
      "input_embedding": embedder["input_embedding"],
      "mm_soft_embedding_norm": embedder["mm_soft_embedding_norm"],
      "mm_input_projection": {"w": embedder["mm_input_projection"]},
    },
    "final_norm": params["final_norm"],
    "vision_encoder": {
      "siglip_encoder": {
        "embedding": vision["embedding"],
        "pos_embedding": vision["pos_embedding"],
        "Transformer": {
          "encoder_norm": vision["norm"],
          **{
            f"encoderblock_{i}": encoder_block(i)
            for i in range(config.vision.depth)
          },
        },
      }
    },
    **{f"layer_{i}": layer(i) for i in range(config.num_layers)},
  }


def save_with_library(params, path):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from gemma import gm

    tree = library_params(CONFIG, params)
    gm.ckpts.save_params(tree, path, wait_until_finished=True)


def pictures(rng, *shape):
  side = CONFIG.vision.image_size
  return rng.integers(0, 256, (*shape, side, side, 3), dtype=np.uint8)


@pytest.mark.peers
def test_logits_equal_the_gemma_library_on_text_and_images(tmp_path):
  """Rows with two images, one and none, padded, in fp32.

  The checkpoint is written by the library.
  """
  rng = np.random.default_rng(1)
  params = random_params(CONFIG)
  save_with_library(params, tmp_path / "saved")
  opened = weights.open_files("gemma", CONFIG, tmp_path / "saved")
  abstract = weights.abstract_params(CONFIG, jnp.dtype(jnp.float32))
  params = opened.load(one_device.on_one_device(abstract))
  start = 255_999
  words = rng.integers(110, VOCAB - 1, (3, 20))
  # The library wants one marker per picture, and pads what it expands.
  rows = np.stack(
    [
      [2, *words[0, :5], start, *words[0, 5:8], start, *words[0, 8:14]],
      [2, *words[1, :3], start, *words[1, 3:14], 0],
      [2, *words[2, :14], 0, 0],
    ]
  ).astype(np.int32)
  images = pictures(rng, 3, 2)
  expected = library_logits(CONFIG, params, rows, images)

  ours, length, at = [], [], []
  for row in rows:
    ids, positions = [], []
    for token in row:
      positions.append(len(ids))
      ids += image_block() if token == start else [token]
    ours.append(ids + [0] * (40 - len(ids)))
    length.append(len(ids) - int((row == 0).sum()))
    at.append(positions)
  states, _, _ = text.prompt_states(
    CONFIG,
    params,
    jnp.asarray(ours),
    jnp.asarray(length),
    images,
    dtype=jnp.float32,
  )
  actual = logprobs.output_logits(
    states, params["embedder"]["input_embedding"], temperature=1.0
  )
  for row, positions, got, want in zip(rows, at, actual, expected, strict=True):
    real = row != 0
    np.testing.assert_allclose(
      got[np.array(positions)][real], want[real], atol=1e-4, rtol=1e-4
    )

  whole = whole_rows.logits(CONFIG, params, rows, images)
  np.testing.assert_allclose(
    whole[rows != 0], expected[rows != 0], atol=1e-4, rtol=1e-4
  )


def test_logits_of_rows_do_not_depend_on_batch_mates_or_spare_images():
  """A row without images, and one with one of two, against rows alone."""
  rng = np.random.default_rng(2)
  params = random_params(CONFIG)
  start = CONFIG.vision.start_of_image
  words = rng.integers(110, VOCAB, (2, 12))
  rows = np.array([[*words[0, :9], 0, 0], [2, start, *words[1, :9]]])
  images = pictures(rng, 2, 2)
  together = whole_rows.logits(CONFIG, params, rows, images)
  assert together.shape == (2, 11, VOCAB) and together.dtype == jnp.float32
  alone = whole_rows.logits(CONFIG, params, rows[:1, :9])
  np.testing.assert_allclose(together[:1, :9], alone, atol=1e-5)
  alone = whole_rows.logits(CONFIG, params, rows[1:], images[1:, :1])
  np.testing.assert_allclose(together[1:], alone, atol=1e-5)


def test_logits_refuse_more_markers_than_images_and_images_without_a_tower():
  params = random_params(CONFIG)
  rows = np.array([[2, CONFIG.vision.start_of_image, 111] * 2])
  images = np.zeros((1, 1, 32, 32, 3), np.uint8)
  with pytest.raises(ValueError, match="name 2 images in a row, .* has 1"):
    whole_rows.logits(CONFIG, params, rows, images)
  blind = dataclasses.replace(CONFIG, vision=None)
  with pytest.raises(ValueError, match="without a vision tower"):
    whole_rows.logits(blind, params, rows, images)


def test_logits_are_those_of_a_twin_in_float64():
  params = random_params(CONFIG)
  row = np.random.default_rng(4).integers(110, VOCAB, (1, 24))
  actual = whole_rows.logits(CONFIG, params, row)[0]
  states = float64_twin.states(CONFIG, jax.device_get(params), row[0])
  embedding = np.asarray(params["embedder"]["input_embedding"], float)
  np.testing.assert_allclose(actual, states @ embedding.T, atol=1e-4)


def bundle(seed=0, completions=3, num_images=1):
  """Prompts of mixed lengths with images, longer than the window."""
  rng = np.random.default_rng(seed)
  prompts = np.zeros((4, 26), np.int32)
  lengths = np.array([17, 26, 22, 19])
  for row, length in zip(prompts, lengths, strict=True):
    body = [2, *image_block() * num_images]
    words = rng.integers(110, VOCAB, length - len(body))
    row[:length] = [*body, *words]
  ids = rng.integers(110, VOCAB, (4, completions, 9)).astype(np.int32)
  return (
    jnp.asarray(prompts),
    jnp.asarray(lengths),
    jnp.asarray(pictures(rng, 4, num_images)),
    jnp.asarray(ids),
  )


def row_states(params, prompts, lengths, images, completions):
  """The slow twin: every row repeats its prompt and its images."""
  num_own = completions.shape[2]
  ids, index, pictures_of = [], [], []
  for prompt, length, picture, rows in zip(
    np.asarray(prompts),
    np.asarray(lengths),
    images,
    np.asarray(completions),
    strict=True,
  ):
    for row in rows:
      padding = [0] * (prompts.shape[1] - length)
      ids.append([*prompt[:length], *row, *padding])
      index.append(length - 1 + np.arange(num_own))
      pictures_of.append(picture)
  states, _, _ = text.prompt_states(
    CONFIG,
    params,
    jnp.asarray(ids),
    jnp.repeat(lengths + num_own, completions.shape[1]),
    jnp.stack(pictures_of),
    dtype=jnp.float32,
  )
  states = jnp.take_along_axis(states, jnp.asarray(index)[..., None], axis=1)
  return states.reshape(*completions.shape, -1)


@pytest.mark.parametrize(
  ("num_images", "remat"),
  [(0, "none"), (1, "full"), (2, "dots"), (1, "offload")],
)
def test_bundle_loss_and_gradient_equal_those_of_separate_rows(
  num_images, remat
):
  params = random_params(CONFIG)
  prompts, lengths, images, completions = bundle(num_images=num_images)
  weight = jax.random.normal(jax.random.key(3), completions.shape)

  def loss(states, params):
    logps, _ = logprobs.per_token_logps(
      states,
      completions,
      params["embedder"]["input_embedding"],
      temperature=0.7,
      chunk_size=10,
    )
    return jnp.mean(weight * logps)

  def bundle_loss(params):
    states = text.bundle_states(
      CONFIG,
      params,
      prompts,
      lengths,
      images,
      completions,
      dtype=jnp.float32,
      remat=remat,
    )
    return loss(states, params)

  def rows_loss(params):
    states = row_states(params, prompts, lengths, images, completions)
    return loss(states, params)

  actual, gradient = jax.jit(jax.value_and_grad(bundle_loss))(params)
  expected, rows_gradient = jax.jit(jax.value_and_grad(rows_loss))(params)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  for (path, got), want in zip(
    jax.tree_util.tree_leaves_with_path(gradient),
    jax.tree.leaves(rows_gradient),
    strict=True,
  ):
    np.testing.assert_allclose(
      got, want, atol=1e-5, err_msg=jax.tree_util.keystr(path)
    )


def test_padding_of_prompts_and_completions_changes_nothing():
  params = random_params(CONFIG)
  prompts, lengths, images, completions = bundle()

  def states(prompts, completions):
    return text.bundle_states(
      CONFIG,
      params,
      prompts,
      lengths,
      images,
      completions,
      dtype=jnp.float32,
      remat="none",
    )

  expected = states(prompts, completions)
  wider = jnp.pad(prompts, ((0, 0), (0, 7)), constant_values=5)
  longer = jnp.pad(completions, ((0, 0), (0, 0), (0, 4)), constant_values=9)
  actual = states(wider, longer)[:, :, : completions.shape[2]]
  np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_an_image_is_seen_both_ways_and_only_by_its_own_prompt():
  params = random_params(CONFIG)
  prompts, lengths, images, _ = bundle()

  def states(images, prompts=prompts):
    return text.prompt_states(
      CONFIG, params, prompts, lengths, images, dtype=jnp.float32
    )[0]

  first_soft, last_soft = 3, 6
  before = states(images)
  changed = images.at[1, 0, -1, -1].add(128)
  moved = jnp.abs(states(changed) - before).max(axis=-1) > 1e-6
  assert moved[1, first_soft : last_soft + 1].all()
  assert not moved[1, :first_soft].any()
  assert not moved[jnp.array([0, 2, 3])].any()
  later_word = prompts.at[1, last_soft + 3].add(-1)
  moved = jnp.abs(states(images, later_word) - before).max(axis=-1) > 1e-6
  assert not moved[1, : last_soft + 3].any()


def test_the_decoder_itself_sees_an_image_both_ways(monkeypatch):
  """With a tower whose tokens each know one corner, by states and keys."""
  params = random_params(CONFIG)
  prompts, lengths, images, _ = bundle(num_images=2)
  width = CONFIG.vision.width

  def corners(config, params, images, *, dtype, remat):
    half = images.shape[-2] // 2
    pixels = images[..., ::half, ::half, 0].reshape(*images.shape[:2], 4, 1)
    return pixels.astype(dtype) / 255 + jnp.arange(width, dtype=dtype).reshape(
      1, 1, 1, width
    )

  monkeypatch.setattr(vision, "soft_tokens", corners)

  @jax.jit
  def seen(prompts, images):
    args = CONFIG, params, prompts, lengths, images
    states, k, _ = text.prompt_states(*args, dtype=jnp.float32)
    keys = k[1].reshape(*prompts.shape, -1)  # Of layer 2.
    return jnp.stack([states[..., :32], keys])

  def moved(prompts, images):
    change = jnp.abs(seen(prompts, images) - before).max(axis=-1)
    return change[:, 1] > 1e-6

  before = seen(prompts, images)
  first, second = np.arange(3, 7), np.arange(11, 15)
  half = images.shape[-2] // 2
  last_token = moved(prompts, images.at[1, 0, half, half, 0].add(128))
  assert last_token[:, first].all()
  assert not last_token[:, : first[0]].any()
  last_token = moved(prompts, images.at[1, 1, half, half, 0].add(128))
  assert last_token[:, second].all()
  assert not last_token[:, : second[0]].any()
  # No word after an image moves any of its tokens.
  later_word = moved(prompts.at[1, 19].add(-1), images)
  assert later_word[:, 19].all()
  assert not later_word[:, :19].any()


def test_rotary_angles_are_off_by_at_most_two_roundings():
  """One rounds the frequency, one its product with a position, to fp32.

  Frequencies computed in fp32, as elsewhere, are off by one or two more.
  """
  config = dataclasses.replace(CONFIG, head_dim=256)
  positions = np.arange(4096)
  actual = text.rope_tables(config, jnp.asarray(positions)[None])
  expected = float64_twin.rotary(config, len(positions))
  exponent = np.arange(0, 256, 2) / 256
  rounding, of_sine = 2.0**-24, 1e-7
  for kind, (base, factor) in enumerate(((1e4, 1.0), (1e6, 8.0))):
    angle = positions[:, None] / base**exponent / factor
    for got, want in zip(actual, expected, strict=True):
      assert (
        np.abs(got[kind, 0] - want[kind]) <= 2 * rounding * angle + of_sine
      ).all()


def test_compile_cost_is_flat_in_depth():
  """With twice the layers, the program differs only in sizes."""

  def operations(num_layers):
    config = dataclasses.replace(CONFIG, num_layers=num_layers)
    abstract = weights.abstract_params(config, jnp.float32)
    prompts, lengths, images, completions = bundle()
    traced = jax.make_jaxpr(
      lambda params: text.bundle_states(
        config,
        params,
        prompts,
        lengths,
        images,
        completions,
        dtype=jnp.float32,
        remat="none",
      )
    )(abstract)
    return len(str(traced).splitlines())

  assert operations(12) == operations(24)


def test_random_params_draw_each_leaf_by_its_own_name():
  params = weights.random_params(CONFIG, 0, jnp.float32)
  again = weights.random_params(
    dataclasses.replace(CONFIG, vocab_size=10), 0, jnp.float32
  )
  other = weights.random_params(CONFIG, 1, jnp.float32)
  q = ("layers", "attn", "q_einsum")
  leaf = lambda tree: tree[q[0]][q[1]][q[2]]  # noqa: E731
  np.testing.assert_array_equal(leaf(params), leaf(again))
  assert not np.array_equal(leaf(params), leaf(other))
  assert np.std(leaf(params)) == pytest.approx(32**-0.5, rel=0.05)


def kept_for_the_backward_pass(num_layers, **remat):
  """Count of numbers that the forward pass keeps for the gradient."""
  config = dataclasses.replace(CONFIG, num_layers=num_layers)
  prompts, lengths, images, completions = bundle()

  def backward(params):
    return jax.vjp(
      lambda params: text.bundle_states(
        config,
        params,
        prompts,
        lengths,
        images,
        completions,
        dtype=jnp.float32,
        **remat,
      ),
      params,
    )[1]

  abstract = weights.abstract_params(config, jnp.float32)
  left = jax.make_jaxpr(backward)(abstract).out_avals
  return sum(x.size for x in left if x.memory_space == jax.memory.Space.Device)


def test_full_remat_keeps_the_input_of_each_layer_alone():
  prompts, _, _, completions = bundle()
  layer = sum(
    x.size // 12
    for x in jax.tree.leaves(
      weights.abstract_params(
        dataclasses.replace(CONFIG, num_layers=12), jnp.float32
      )["layers"]
    )
  )
  states = (prompts.size + completions.size) * CONFIG.embed_dim
  more, less = (kept_for_the_backward_pass(n, remat="full") for n in (12, 6))
  number_window_and_kind = 3
  beside = (more - less) / 6 - layer - states
  assert 0 <= beside <= number_window_and_kind


@pytest.mark.parametrize("part", ["remat", "vision_remat"])
def test_each_policy_keeps_less_than_the_one_before(part):
  others = {"remat": "full", "vision_remat": "full"}
  kept = [
    kept_for_the_backward_pass(6, **others | {part: policy})
    for policy in REMAT_POLICIES
  ]
  assert kept[0] > 1.1 * kept[1] > 1.1 * 1.1 * kept[2]
  # The inputs of layers are not many where there are but two.
  assert kept[2] > kept[3]


def test_a_tower_at_half_the_size_interpolates_its_positions():
  """Two by two of four by four patches; the same number of soft tokens."""
  tower = dataclasses.replace(CONFIG.vision, soft_tokens=4)
  half = dataclasses.replace(tower, input_size=tower.image_size // 2)
  params = random_params(dataclasses.replace(CONFIG, vision=tower))
  params = params["vision_encoder"]
  images = np.full((1, tower.image_size, tower.image_size, 3), 200, np.uint8)

  def soft(config, params, images):
    return vision.soft_tokens(
      config, params, jnp.asarray(images), dtype=jnp.float32, remat="none"
    )

  # One colour and one position everywhere: all patches are alike, whatever
  # their number, and so is what the tower makes of them.
  alike = params | {"pos_embedding": jnp.ones_like(params["pos_embedding"])}
  small = images[:, : half.shown_size, : half.shown_size]
  want = soft(tower, alike, images)
  got = soft(half, alike, small)
  assert got.shape == want.shape == (1, 4, tower.width)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  # A slope stays one: positions on a line, at half the points.
  line = np.linspace(0, 3, 4)[:, None, None] * np.ones((4, 4, tower.width))
  sloped = vision.position_embeddings(
    half, jnp.asarray(line.reshape(1, 16, -1))
  )
  np.testing.assert_allclose(
    sloped.reshape(2, 2, -1)[:, 0, 0], [5 / 7, 16 / 7], rtol=1e-5
  )


def test_attention_in_parts_equals_attention_at_once(monkeypatch):
  tower = CONFIG.vision
  params = random_params(CONFIG)["vision_encoder"]
  rng = np.random.default_rng(0)
  shape = (2, tower.image_size, tower.image_size, 3)
  images = jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))

  def gradient(params):
    return jax.value_and_grad(
      lambda params: jnp.sum(
        jnp.sin(
          vision.soft_tokens(
            tower, params, images, dtype=jnp.float32, remat="full"
          )
        )
      )
    )(params)

  want = gradient(params)
  monkeypatch.setattr(vision, "_PATCHES_AT_A_TIME", 4)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=1e-4),
    gradient(params),
    want,
  )
  # Four parts of four patches of each of two pictures.
  assert "f32[4,2,4,2,16]" in str(jax.make_jaxpr(gradient)(params))
