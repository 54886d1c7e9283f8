"""Rewards of frozen reward models, which score in bundles on the policy's mesh.

They read the policy's own tokens, so they share its tokenizer, and each sees
images as large as its tower wants.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float

from data_pipelines import images, pipeline
from data_pipelines.text import own_tokenizer
from data_pipelines.text import tokenizer as tokens
from data_pipelines.text.chat_format import GEMMA3
from data_pipelines.validation import require, user_errors
from grpo_tpu.checkpoint import load, networks
from grpo_tpu.checkpoint.frozen import Frozen, abstract_frozen
from grpo_tpu.distributed import compile_cache, sharding
from grpo_tpu.models import scores
from grpo_tpu.models.image_features import ImageEncoder
from grpo_tpu.models.network import ForwardConfig, make_forward
from grpo_tpu.models.settings import ModelSettings
from grpo_tpu.rewards.networks import Completed, Values
from grpo_tpu.rewards.settings import RewardConfig

_SETTING = "rewards.models"
_ALL = f"objective.teacher, {_SETTING} or rewards.judges"


def read_models(
  config: RewardConfig, policy: ModelSettings
) -> list[ModelSettings]:
  """The settings of the reward models, which have a head.

  Raises:
    ValueError: Weights cannot be found, or are of no reward model of this size
      of vocabulary and of images.
  """
  found = []
  for weights, _ in config.models:
    model = networks.read_settings(weights, policy, setting=_SETTING)
    ours, theirs = policy.network, model.network
    rule = "be a reward model, but it has no head that scores"
    remedy = "train one with data.kind=preference and "
    remedy += "objective.preset=bradley_terry, and name its run"
    require(bool(model.head), _SETTING, weights, rule, remedy)
    rule = f"have the vocabulary and the image tokens of {policy.name}"
    remedy = "name a reward model of the same family"
    holds = theirs.soft_tokens in (0, ours.soft_tokens) or not ours.soft_tokens
    holds = holds and ours.vocab_size == theirs.vocab_size
    require(holds, _SETTING, weights, rule, remedy)
    found.append(model)
  return found


def check_data(
  models: Sequence[ModelSettings],
  tokenizer: tokens.Tokenizer,
  *,
  has_images: bool,
) -> None:
  """Refuses networks that cannot read the prompts of a run; needs no device.

  Raises:
    ValueError: A model has another tokenizer, or no tower for the images.
  """
  for model in models:
    _check_sight(model, has_images)
    own = own_tokenizer.find(model.weights)
    known = own.fingerprint
    is_small = tokenizer.vocab_size != GEMMA3.vocab_size
    if is_small and own.path and not known:
      known = tokens.Tokenizer(own.path).fingerprint
    rule = "have been trained with the tokenizer of the data"
    remedy = "train it on data that were prepared with the same tokenizer"
    holds = known in ("", tokenizer.fingerprint)
    require(holds, _ALL, model.weights, rule, remedy)


def _check_sight(model: ModelSettings, has_images: bool) -> None:
  rule = "see the images of the data, and it is a text model"
  remedy = "name one with an image tower, or data without images"
  sees = not has_images or model.network.vision is not None
  require(sees, _ALL, model.weights, rule, remedy)


def open_models(
  config: RewardConfig, policy: ModelSettings, mesh: Mesh, **options: Any
) -> list["RewardModel"]:
  """Loads the reward models of a run; `options` are those of `RewardModel`."""
  return [
    RewardModel(f"model_{number}", model, config, mesh, **options)
    for number, model in enumerate(read_models(config, policy), start=1)
  ]


class BundleScorer:
  """A frozen network that scores bundles on the mesh, part by part."""

  def __init__(
    self, score: Callable, network: Frozen, mesh: Mesh, bundles_at_a_time: int
  ):
    """`score(params, *bundles)` gives one number per completion."""
    self._network, self._mesh = network, mesh
    program = functools.partial(score_parts, score, bundles_at_a_time)
    self.program = compile_cache.AotJit(jax.jit(program))

  def _start(self, params: dict, *bundles: Array) -> Callable[[], np.ndarray]:
    """Starts the devices; the result waits for this process's scores."""
    found = self.program(params, *bundles)
    if self._network.is_copied:  # No two networks are on the devices at a time.
      jax.block_until_ready(found)
    return lambda: sharding.local_rows(self._mesh, found)


class RewardModel(BundleScorer):
  """A reward model of a run; see `networks.NetworkReward`."""

  def __init__(
    self,
    name: str,
    model: ModelSettings,
    config: RewardConfig,
    mesh: Mesh,
    *,
    bundles_at_a_time: int,
    images_per_shard: int,
    pan_and_scan: images.PanAndScan,
  ):
    """Loads the model, whose component has this name."""
    self.names: Sequence[str] = (name,)
    self._model, self._pan_and_scan = model, pan_and_scan
    self._dtype = config.network_dtype or model.param_dtype
    forward = network_forward(model, mesh)
    score = functools.partial(scores.scores, forward)
    network = load_frozen(model, config, mesh)
    super().__init__(score, network, mesh, bundles_at_a_time)
    self._encoder = None
    if vision := forward.config.vision:
      self._encoder = ImageEncoder(
        vision,
        mesh,
        dtype=forward.dtype,
        per_shard=images_per_shard,
        cache_bytes=0,
      )

  def start(
    self, prompts: pipeline.Batch, completed: Completed
  ) -> Callable[[], Values]:
    """Starts the devices; the result waits for them. All processes call it."""
    ids, vision = prompts.prompt_ids, self._model.network.vision
    with user_errors():
      _check_sight(self._model, bool(prompts.images.shape[1]))
    params = self._network.params  # Copied once, if they are.
    shown = np.zeros((len(ids), 0, 0, 0, 3), np.uint8)
    if self._encoder and vision:
      is_soft = ids == GEMMA3.image_placeholder
      counts = is_soft.sum(axis=1) // vision.soft_tokens
      pixels = self._pixels(prompts, vision.shown_size)
      shown = self._encoder.features(params, pixels, counts)
    rows = ids, prompts.prompt_length, shown
    rows = sharding.device_put_batch(self._mesh, rows)
    wait = self._start(params, *rows, completed.ids, completed.mask)
    return lambda: {self.names[0]: wait()}

  def compile_ahead(
    self,
    shapes: Iterable[tuple[int, int]],
    num_prompts: int,
    num_completions: int,
    num_tokens: int,
  ) -> None:
    """Compiles for batches with prompts of these lengths and images of each."""
    params = abstract_frozen(self._model, self._mesh, dtype=self._dtype)
    sizes = num_prompts, num_completions, num_tokens
    for shape in sorted(shapes):
      if self._encoder and shape[1]:
        self._encoder.compile_ahead(params)
      bundles = abstract_bundles(self._model, self._mesh, shape, *sizes)
      self.program.prepare(params, *bundles)

  def _pixels(self, prompts: pipeline.Batch, size: int) -> np.ndarray:
    """The images of the prompts at the size of this model's tower."""
    count, slots, given, *_ = prompts.images.shape
    if given == size or not slots:
      return prompts.images
    pixels = np.zeros((count, slots, size, size, 3), np.uint8)
    for row, problem in enumerate(prompts.problems):
      views = [
        images.views(images.decode(x), size, self._pan_and_scan)
        for x in problem.images
        if prompts.valid[row]
      ]
      for slot, view in enumerate(x for each in views for x in each):
        pixels[row, slot] = view
    return pixels


def load_frozen(
  model: ModelSettings, config: RewardConfig, mesh: Mesh
) -> Frozen:
  """Loads a reward model or a judge, in the type and memory of the settings."""
  frozen = Frozen(
    load.load_merged(model, mesh),
    mesh,
    dtype=config.network_dtype or model.param_dtype,
    memory=config.network_memory,
    setting="rewards.network_memory",
  )
  logging.info("Loaded the frozen model %s.", model.weights)
  return frozen


def network_forward(model: ModelSettings, mesh: Mesh) -> ForwardConfig:
  """How a frozen network runs, which samples nothing."""
  sampling = {"temperature": 1.0, "min_new_tokens": 0, "banned_ids": ()}
  return make_forward(model, mesh, **sampling)


def score_parts(
  score: Callable, bundles_at_a_time: int, params: dict, *bundles: Array
) -> Float[Array, "U C"]:
  """`score(params, *bundles)` in the fewest equal parts of so many bundles."""
  rows, mesh = len(bundles[0]), jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else mesh.size // mesh.shape["tensor"]
  count = next(
    n
    for n in range(1, rows + 1)
    if rows % (n * shards) == 0 and rows // n <= bundles_at_a_time
  )

  def score_part(_, part):
    return None, score(params, *part)

  parts = sharding.microbatches(bundles, count)
  _, found = jax.lax.scan(score_part, None, parts)
  return sharding.whole_batch(found)


def abstract_bundles(
  model: ModelSettings,
  mesh: Mesh,
  shape: tuple[int, int],
  num_prompts: int,
  num_completions: int,
  num_tokens: int,
) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Shapes and shardings of the arguments of `score_parts`.

  `shape` is the length of the prompts and the images of each.
  """

  def array(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
    return sharding.abstract_batch(mesh, dtype, num_prompts, *sizes)

  (length, num_images), vision = shape, model.network.vision
  shown = array(np.uint8, 0, 0, 0, 3)
  if vision:
    sizes = num_images, vision.soft_tokens, vision.width
    shown = array(jnp.dtype(model.compute_dtype), *sizes)
  completions = num_completions, num_tokens
  return (
    *(array(np.int32, length), array(np.int32), shown),
    *(array(np.int32, *completions), array(np.bool_, *completions)),
  )
