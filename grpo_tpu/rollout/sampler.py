"""Samples completions of prompts, with given parameters, on a mesh.

Settings become static arguments of compiled functions here, so that training
and evaluation run the same programs.
"""

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines import pipeline, record_index
from data_pipelines.text import tokenizer as tokens
from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.distributed import sharding
from grpo_tpu.models.image_features import ImageEncoder
from grpo_tpu.models.network import make_forward
from grpo_tpu.models.settings import ModelSettings
from grpo_tpu.rollout import engine, generate
from grpo_tpu.rollout.settings import RolloutConfig

type Texts = Mapping[int, list[str]]
type Truncated = Mapping[int, list[bool]]


class Samples(NamedTuple):
  """Completions of a batch of prompts."""

  completions: engine.Completions
  # Image features that training may read; None if it must read pixels.
  images: jax.Array | None
  metrics: dict[str, float]


class Sampler:
  """Samples completions; holds compiled functions, no parameters.

  `forward` says how the network runs, in sampling and in training.
  """

  def __init__(
    self,
    model: ModelSettings,
    settings: RolloutConfig,
    mesh: Mesh,
    tokenizer: tokens.Tokenizer,
  ):
    """Compiles nothing yet."""
    self.settings, self.mesh, self.tokenizer = settings, mesh, tokenizer
    # Marks around an image's placeholders are never drawn: programs that
    # expand a mark to an image would read such a completion as another one.
    # The placeholder itself is outside the vocabulary.
    marks = (tokenizer.start_of_image, tokenizer.end_of_image)
    self.forward = make_forward(
      model,
      mesh,
      temperature=settings.temperature,
      min_new_tokens=settings.min_new_tokens,
      banned_ids=marks,
    )

  @functools.cached_property
  def image_encoder(self) -> ImageEncoder | None:
    """Encodes images; None for a model of text alone."""
    vision = self.forward.config.vision
    if vision is None:
      return None
    return ImageEncoder(
      vision,
      self.mesh,
      dtype=self.forward.dtype,
      per_shard=self.settings.pictures_per_shard,
      cache_bytes=self.settings.image_cache_mib * 2**20,
    )

  def sample(
    self,
    params: dict,
    prompts: pipeline.Batch,
    key: jax.Array,
    *,
    num_completions: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    num_parts: int = 1,
    poll: Callable[[], None] = generate.no_poll,
    on_finished: Callable[[Texts, Truncated], None] | None = None,
    on_tokens: generate.OnTokens | None = None,
  ) -> Samples:
    """Samples completions of this process's prompts.

    Args:
      params: The parameters.
      prompts: The prompts of this process; those that are not valid get
        completions without a token.
      key: The key that each row's key is folded from.
      num_completions: Completions per prompt.
      temperature: Divides the logits; 0 takes the most likely token.
      top_k: Draws among this many most likely tokens; 0 among all. Not for
        training.
      top_p: Draws among the fewest tokens with this probability together; 1
        among all. Not for training.
      num_parts: Number of parts in which the prompts are completed, one after
        the other, to save memory; the samples are the same.
      poll: Called between chunks of tokens, equally often on every process. It
        may raise, which abandons the rollout.
      on_finished: Called between chunks with the texts of prompts whose
        completions have all ended, by the prompt's index in `prompts`, and with
        True for each completion that was cut off.
      on_tokens: Called between chunks with the token ids so far of all prompts
        of a part, by the prompt's index in the part.
    """
    start = time.perf_counter()
    images = self._image_rows(params, prompts)
    encode_seconds = time.perf_counter() - start
    ids, length = prompts.prompt_ids, prompts.prompt_length
    rows = (ids, length, images, prompts.prompt_index)
    whole = self._put_prompts(rows)
    limits = np.where(prompts.valid, self.settings.max_new_tokens, 0)
    limits = np.repeat(limits[:, None], num_completions, axis=1)
    settings = self.engine_settings(
      num_completions, temperature, top_k=top_k, top_p=top_p
    )

    def sample_part(part: int):
      def report_texts(
        ids: Mapping[int, list[list[int]]], truncated: Truncated
      ) -> None:
        assert on_finished is not None
        decode, place = self.tokenizer.decode, lambda i: i * num_parts + part
        on_finished(
          {place(i): [decode(x) for x in rows] for i, rows in ids.items()},
          {place(i): flags for i, flags in truncated.items()},
        )

      prompts = whole
      if num_parts > 1:  # Every `num_parts`-th prompt of each shard.
        prompts = self._put_prompts([x[part::num_parts] for x in rows])
      return generate.sample_completions(
        params,
        prompts,
        key,
        settings=settings,
        mesh=self.mesh,
        stop_strings=self._stop_strings,
        row_limits=limits[part::num_parts],
        poll=poll,
        on_finished=report_texts if on_finished else None,
        on_tokens=on_tokens,
      )

    parts, reports = zip(*map(sample_part, range(num_parts)), strict=True)
    completions = parts[0]
    if num_parts > 1:
      completions = _interleave(sharding.batch_sharding(self.mesh), *parts)
    metrics = generate.sum_reports(reports).scalars(self.mesh)
    if self.image_encoder:
      metrics["perf/pictures_encoded"] = self.image_encoder.num_encoded
      metrics["perf/pictures_seconds"] = encode_seconds
    is_frozen = not self.forward.train_vision
    return Samples(completions, whole.images if is_frozen else None, metrics)

  def compile_ahead(
    self,
    params: dict,
    shapes: Iterable[record_index.BatchShape],
    *,
    num_prompts: int,
    num_parts: int = 1,
    **sampling: Any,
  ) -> None:
    """Compiles the programs of `sample` for batches of these shapes.

    `num_prompts` counts the prompts of a batch over all processes; `sampling`
    is for `engine_settings`.
    """
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      params,
    )
    shown = {shape[:2] for shape in shapes}
    if self.image_encoder and any(per_row for _, per_row in shown):
      self.image_encoder.compile_ahead(params)
    replicated = sharding.replicated_sharding(self.mesh)
    dtype = jax.random.key(0).dtype
    key = jax.ShapeDtypeStruct((), dtype, sharding=replicated)
    for length, num_images in sorted(shown):
      generate.compile_ahead(
        params,
        self.abstract_prompts(num_prompts // num_parts, length, num_images),
        key,
        settings=self.engine_settings(**sampling),
        mesh=self.mesh,
      )

  def num_programs(
    self,
    shapes: Iterable[record_index.BatchShape],
    *,
    num_prompts: int,
    num_parts: int = 1,
    **sampling: Any,
  ) -> int:
    """The number of programs that `compile_ahead` compiles for such shapes."""
    shards = sharding.data_shards(self.mesh)[1]
    settings = self.engine_settings(**sampling)
    per_shard = num_prompts // num_parts // shards
    of_shape = generate.num_programs(settings, per_shard)
    shown = {shape[:2] for shape in shapes}
    has_images = self.image_encoder and any(per_row for _, per_row in shown)
    return len(shown) * of_shape + bool(has_images)

  def abstract_prompts(
    self, num_prompts: int, length: int, num_images: int
  ) -> engine.Prompts:
    """Shapes and shardings of prompts, as the compiled functions take them."""

    def array(dtype: Any, *shape: int) -> Any:
      return sharding.abstract_batch(self.mesh, dtype, num_prompts, *shape)

    images = array(np.uint8, 0, 0, 0, 3)
    if vision := self.forward.config.vision:
      shape = (num_images, vision.soft_tokens, vision.width)
      images = array(self.forward.dtype, *shape)
    ids, number = array(np.int32, length), array(np.int32)
    return engine.Prompts(ids, length=number, images=images, index=number)

  def engine_settings(
    self,
    num_completions: int,
    temperature: float,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
  ) -> engine.Settings:
    """Static arguments of the compiled functions."""
    return engine.Settings(
      config=self.forward.config,
      num_completions=num_completions,
      max_new_tokens=self.settings.max_new_tokens,
      min_new_tokens=self.settings.min_new_tokens,
      chunk_tokens=self.settings.chunk_tokens,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      dtype=self.forward.dtype,
      attention=self.forward.attention,
      banned_ids=self.forward.banned_ids,
    )

  def images(self, params: dict, prompts: pipeline.Batch) -> jax.Array:
    """Images of this process's prompts as training reads them, globally.

    With a frozen tower these are its features, so that no pass runs the tower
    again; otherwise pixels.
    """
    rows = prompts.images
    if not self.forward.train_vision:
      rows = self._image_rows(params, prompts)
    return sharding.device_put_batch(self.mesh, rows)

  def texts(self, completions: engine.Completions) -> list[list[str]]:
    """Decoded completions, one list per prompt of this process."""
    rows = completions.ids, completions.mask
    return self.decode(*sharding.local_rows(self.mesh, rows))

  def decode(self, ids: np.ndarray, mask: np.ndarray) -> list[list[str]]:
    """Decodes the tokens of `ids` [U, C, T] at which `mask` is True."""
    return [
      [
        self.tokenizer.decode(row[kept].tolist())
        for row, kept in zip(rows, masks, strict=True)
      ]
      for rows, masks in zip(ids, mask, strict=True)
    ]

  def _image_rows(self, params: dict, prompts: pipeline.Batch) -> np.ndarray:
    """Features of this process's images, on the host."""
    encoder, vision = self.image_encoder, self.forward.config.vision
    if encoder is None or vision is None:
      return prompts.images
    is_soft = prompts.prompt_ids == GEMMA3.image_placeholder
    num_images = is_soft.sum(axis=1) // vision.soft_tokens
    return encoder.features(params, prompts.images, num_images)

  def _put_prompts(self, rows: Any) -> engine.Prompts:
    return engine.Prompts(*sharding.device_put_batch(self.mesh, tuple(rows)))

  @property
  def _stop_strings(self) -> generate.StopStrings | None:
    strings = self.settings.stop_strings
    if not strings:
      return None
    return generate.StopStrings(strings, self.tokenizer.decode)


@functools.partial(jax.jit, static_argnums=0)
def _interleave(row_sharding, *parts):
  """Interleaves strided slices of a batch back into the batch."""

  def join(*parts):
    rows = jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
    return jax.lax.with_sharding_constraint(rows, row_sharding)

  return jax.tree.map(join, *parts)
