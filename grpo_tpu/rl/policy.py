"""The model of a run, on its mesh: loaded once, sampled and scored by all.

Settings become static arguments here, so that training and evaluation run the
same programs.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from data_pipelines import pipeline
from data_pipelines.text import tokenizer as tokens
from grpo_tpu.checkpoint import reader
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import sharding
from grpo_tpu.models import image_features as pictures
from grpo_tpu.models.gemma3 import attention, lora, weights
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.models.settings import LoraConfig, ModelSettings
from grpo_tpu.rl import optimizer, train_state, train_step
from grpo_tpu.rollout import engine, generate


class Sampled(NamedTuple):
  """A batch of prompts with their completions.

  Attributes:
    completions: As global arrays.
    images: What training may read in place of pixels; None if nothing.
    scalars: What it took, by the names of `metrics`.
  """

  completions: engine.Completions
  images: jax.Array | None
  scalars: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Policy:
  """What runs a set of parameters.

  Attributes:
    config: The run's settings.
    mesh: Where arrays lie.
    tokenizer: What spells prompts and reads completions.
  """

  config: run_config.Config
  mesh: Mesh
  tokenizer: tokens.Tokenizer

  @property
  def model(self) -> ForwardConfig:
    """How the network is run in training and scoring."""
    return ForwardConfig(
      config=self.config.model_config,
      dtype=jnp.dtype(self.config.model.compute_dtype),
      remat=self.config.model.remat,
      temperature=self.config.rollout.temperature,
      chunk_size=self.config.model.logits_chunk,
      train_vision=self.config.model.train_vision,
      vision_remat=self.config.model.vision_remat,
      banned_ids=self.banned_ids,
      min_new_tokens=self.config.rollout.min_new_tokens,
      attention=attention.choose_implementation(
        self.config.model.attention, self.mesh.devices.flat[0].platform
      ),
    )

  @property
  def banned_ids(self) -> tuple[int, ...]:
    """What may not be written: the marks around an image's placeholders.

    The placeholder itself is outside the vocabulary, so it is never drawn, and
    a drawn mark changes no merge here: completions are looked up in the
    embedding, whatever their ids. Programs that expand a mark to an image would
    read such a completion as another one.
    """
    return (self.tokenizer.start_of_image, self.tokenizer.end_of_image)

  @property
  def tx(self) -> optax.GradientTransformation:
    """The run's optimizer."""
    trains_vision = self.config.model.train_vision
    return optimizer.make_optimizer(
      self.config.optimizer_config,
      is_frozen=lambda path: (
        path.startswith("vision_encoder") and not trains_vision
      ),
    )

  def make_update(self) -> Callable:
    """The run's update, from `train_step.make_train_step`."""
    config = self.config
    return train_step.make_train_step(
      self.model,
      self.tx,
      config=None
      if config.data.kind == "demonstrations"
      else config.objective_config,
      entropy_bonus=config.shaping.entropy_bonus,
      sampler_correction=config.shaping.sampler_correction,
      num_microbatches=config.num_microbatches,
      lora=config.lora,
    )

  def abstract_state(self) -> train_state.TrainState:
    """Shapes, types and places of what the run trains."""

    def new(params):
      zero = jnp.zeros((), jnp.int32)
      return train_state.TrainState(zero, zero, params, self.tx.init(params))

    settings = self.config.lora
    trained = (
      self.abstract_adapters(settings) if settings else self.abstract_params()
    )
    return self.placed_shapes(jax.eval_shape(new, trained))

  def run_params(self, trained: Any, frozen: Any) -> dict:
    """What runs the network: adapters where they go, else what is trained."""
    settings = self.config.lora
    return (
      lora.with_adapters(frozen, trained, settings) if settings else trained
    )

  def abstract_params(self) -> dict:
    """Shapes, types and places of the parameters."""
    return abstract_params(self.config, self.mesh)

  def placed_shapes(self, tree: Any) -> Any:
    """The shapes of a tree with the places that the rules give them."""
    return _placed_shapes(self.mesh, tree)

  def initial_params(self) -> dict:
    """The parameters that `model.weights` names, on the mesh.

    Raises:
      ValueError: The run named has no such checkpoint, or one of another model.
    """
    return initial_params(self.config, self.mesh)

  def reference(self, params: dict) -> dict:
    """Parameters to be kept as the frozen reference, as the settings want it.

    Norms and the tower stay as they are: they are small, and computed in fp32.

    Raises:
      ValueError: The devices have no such memory.
    """
    settings = self.config.model
    kind = settings.reference_memory
    kinds = {m.kind for m in self.mesh.local_devices[0].addressable_memories()}
    if kind not in kinds:
      raise ValueError(
        f"model.reference_memory ({kind!r}) must be a memory of the devices, "
        f"which have {', '.join(sorted(kinds))}; set "
        "model.reference_memory=device."
      )
    params = _cast(params, settings)
    if kind == "device":
      return params
    places = jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), params)
    return jax.device_put(params, places)

  def abstract_reference(self, *, on_device: bool = False) -> dict:
    """Shapes, types and places of `reference`, where it lies or where it runs.

    Args:
      on_device: Where the network runs.
    """
    settings, places = self.config.model, self.abstract_params()
    kind = "device" if on_device else settings.reference_memory
    shapes = jax.eval_shape(lambda x: _cast(x, settings), places)
    return jax.tree.map(
      lambda x, place: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=place.sharding.with_memory_kind(kind)
      ),
      shapes,
      places,
    )

  def on_device(self, reference: dict) -> dict:
    """A reference where the network runs; itself if it lies there."""
    if self.config.model.reference_memory == "device":
      return reference
    places = jax.tree.map(
      lambda x: x.sharding.with_memory_kind("device"), reference
    )
    return jax.device_put(reference, places)

  def abstract_adapters(self, settings: LoraConfig) -> dict:
    """Shapes, types and places of adapters."""
    return self.placed_shapes(
      lora.abstract_adapters(self.config.model_config, settings)
    )

  def initial_adapters(self, settings: LoraConfig) -> dict:
    """Adapters that change nothing yet, drawn from the run's seed."""
    values = lora.initial_adapters(
      self.config.model_config, settings, self.config.seed
    )
    return _on_mesh(values, self.abstract_adapters(settings))

  def sample(
    self,
    params: dict,
    batch: pipeline.Batch,
    step_key: jax.Array,
    *,
    num_completions: int,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    num_parts: int = 1,
    poll: Callable[[], None] = generate.no_poll,
    finished: Callable[[Mapping[int, list[str]]], None] | None = None,
  ) -> Sampled:
    """Completions of this process's prompts, as global arrays.

    Args:
      params: The policy.
      batch: This process's prompts.
      step_key: What the rows' keys are folded from.
      num_completions: Rows per prompt.
      temperature: Logits are divided by it; 0 takes the likeliest token.
      top_k: Draws from the likeliest so many tokens alone; 0 from all. Not for
        training, and neither is the next.
      top_p: Draws from the fewest that hold this share; 1 from all.
      num_parts: The prompts are completed in so many parts, one after the
        other, in less memory; the samples are the same.
      poll: Called between chunks of tokens, equally often on every process. It
        may raise, which abandons the rollout.
      finished: Called between chunks with the texts of this process's prompts
        whose completions have all ended, by the prompts' places in `batch`.
    """
    started = time.perf_counter()
    rows = self._picture_rows(params, batch)
    encoded = time.perf_counter() - started
    read = (batch.prompt_ids, batch.prompt_length, rows, batch.prompt_index)
    whole = engine.Prompts(*sharding.device_put_batch(self.mesh, read))

    def rolled_out(part: int):
      # Each shard's every so manieth prompt.
      prompts = whole
      if num_parts > 1:
        some = [x[part::num_parts] for x in read]
        prompts = engine.Prompts(*sharding.device_put_batch(self.mesh, some))

      def told(ids):
        assert finished is not None
        places = {i * num_parts + part: row for i, row in ids.items()}
        finished(self._read(places))

      return generate.sample_completions(
        params,
        prompts,
        step_key,
        settings=self._settings(num_completions, temperature, top_k, top_p),
        mesh=self.mesh,
        stop_strings=self._stops,
        poll=poll,
        on_finished=told if finished else None,
      )

    parts, reports = zip(*map(rolled_out, range(num_parts)), strict=True)
    completions = parts[0] if num_parts == 1 else self._joined(parts)
    scalars = generate.sum_reports(reports).scalars(self.mesh)
    if self.pictures:
      scalars["perf/pictures_encoded"] = self.pictures.num_encoded
      scalars["perf/pictures_seconds"] = encoded
    is_frozen = not self.config.model.train_vision
    return Sampled(completions, whole.images if is_frozen else None, scalars)

  def prepare_sampling(
    self,
    params: dict,
    shapes: Iterable[tuple[int, int]],
    *,
    num_prompts: int,
    num_completions: int,
    temperature: float,
    num_parts: int = 1,
  ) -> None:
    """Compiles what `sample` runs, before it does.

    Args:
      params: The policy.
      shapes: Padded lengths of prompts, and how many images each has.
      num_prompts: Of a batch, over all processes.
      num_completions: As for `sample`.
      temperature: As for `sample`.
      num_parts: As for `sample`.
    """
    params = _shapes(params)
    place = sharding.batch_sharding(self.mesh)

    def array(dtype, *shape) -> Any:
      shape = (num_prompts // num_parts, *shape)
      return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    vision = self.config.model_config.vision
    if self.pictures:
      self.pictures.compile_ahead(params)
    key = jax.ShapeDtypeStruct(
      (),
      jax.random.key(0).dtype,
      sharding=sharding.replicated_sharding(self.mesh),
    )
    for width, slots in sorted(shapes):
      images = array(np.uint8, 0, 0, 0, 3)
      if vision:
        images = array(
          self.model.dtype, slots, vision.soft_tokens, vision.width
        )
      generate.compile_ahead(
        params,
        engine.Prompts(
          ids=array(np.int32, width),
          length=array(np.int32),
          images=images,
          index=array(np.int32),
        ),
        key,
        settings=self._settings(num_completions, temperature, 0, 1.0),
        mesh=self.mesh,
      )

  def images(self, params: dict, batch: pipeline.Batch) -> jax.Array:
    """What training reads of this process's pictures, as a global array.

    Pixels; or, if the tower is frozen, what it makes of them, so that no pass
    needs to run it again.
    """
    if self.config.model.train_vision:
      return sharding.device_put_batch(self.mesh, batch.images)
    return sharding.device_put_batch(
      self.mesh, self._picture_rows(params, batch)
    )

  @functools.cached_property
  def pictures(self) -> pictures.ImageEncoder | None:
    """What encodes pictures; None for a model that sees none."""
    vision = self.config.model_config.vision
    if vision is None:
      return None
    return pictures.ImageEncoder(
      vision,
      self.mesh,
      dtype=self.model.dtype,
      per_shard=self.config.rollout.pictures_per_shard,
      cache_bytes=self.config.rollout.image_cache_mib * 2**20,
    )

  def _picture_rows(self, params: dict, batch: pipeline.Batch) -> np.ndarray:
    """What the tower makes of this process's pictures."""
    if self.pictures is None:
      return batch.images
    return self.pictures.features(params, batch.images)

  def _joined(
    self, parts: tuple[engine.Completions, ...]
  ) -> engine.Completions:
    """The completions of all parts, each prompt in its place again."""
    return _interleaved(sharding.batch_sharding(self.mesh), *parts)

  def _settings(
    self, num_completions: int, temperature: float, top_k: int, top_p: float
  ) -> engine.Settings:
    settings = self.config.rollout
    return engine.Settings(
      config=self.config.model_config,
      num_completions=num_completions,
      max_new_tokens=settings.max_new_tokens,
      min_new_tokens=settings.min_new_tokens,
      chunk_tokens=settings.chunk_tokens,
      temperature=temperature,
      top_k=top_k,
      top_p=top_p,
      dtype=self.model.dtype,
      attention=self.model.attention,
      banned_ids=self.banned_ids,
    )

  @property
  def _stops(self) -> generate.StopStrings | None:
    strings = self.config.rollout.stop_strings
    return (
      generate.StopStrings(strings, self.tokenizer.decode) if strings else None
    )

  def _read(self, ids: Mapping[int, list[list[int]]]) -> dict[int, list[str]]:
    return {
      prompt: [self.tokenizer.decode(row) for row in rows]
      for prompt, rows in ids.items()
    }

  def texts(self, completions: engine.Completions) -> list[list[str]]:
    """What was written, one list per prompt of this process."""
    ids, mask = sharding.local_rows(
      self.mesh, (completions.ids, completions.mask)
    )
    return [
      [
        self.tokenizer.decode(row[kept].tolist())
        for row, kept in zip(rows, masks, strict=True)
      ]
      for rows, masks in zip(ids, mask, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def _interleaved(place, *parts):
  """Trees whose rows are every so manieth of one, as that one."""

  def joined(*parts):
    rows = jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
    return jax.lax.with_sharding_constraint(rows, place)

  return jax.tree.map(joined, *parts)


def _cast(params: dict, model: ModelSettings) -> dict:
  """A reference's matrices in the type that is set for them."""
  dtype = jnp.dtype(model.reference_dtype or model.param_dtype)

  def cast(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    is_kept = name.endswith("scale") or name.startswith("vision_encoder")
    return x if is_kept else x.astype(dtype)

  if dtype == model.param_dtype:
    return params
  return jax.tree_util.tree_map_with_path(cast, params)


def _shapes(tree: Any) -> Any:
  """The shapes of arrays that have places."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def abstract_params(config: run_config.Config, mesh: Mesh) -> dict:
  """Shapes, types and places of a run's parameters."""
  tree = weights.abstract_params(
    config.model_config, jnp.dtype(config.model.param_dtype)
  )
  return _placed_shapes(mesh, tree)


def initial_params(config: run_config.Config, mesh: Mesh) -> dict:
  """The parameters that `model.weights` names, on the mesh.

  Raises:
    ValueError: The files or the run named are not there, or of another model.
  """
  scheme, _, rest = config.model.weights.partition(":")
  abstract = abstract_params(config, mesh)
  if scheme == "run":
    adapters = saved_adapters(config, mesh)
    if adapters:
      return _merged(config, mesh, *adapters)
    workdir, step = _run_and_step(rest)
    params, _ = reader.restore_params(f"{workdir}/checkpoints", step, abstract)
    return params
  if scheme in weights.OPENERS:
    return weights.OPENERS[scheme](config.model_config, rest).load(abstract)
  values = weights.random_params(
    config.model_config, int(rest), np.dtype(config.model.param_dtype)
  )
  return _on_mesh(values, abstract)


def saved_adapters(
  config: run_config.Config, mesh: Mesh
) -> tuple[dict, LoraConfig, str] | None:
  """Adapters that `model.weights` names, and what they belong to.

  Returns:
    The adapters, what they are like, and the weights under them in the words of
    `model.weights`; None where these name a whole model.

  Raises:
    ValueError: The run named has no such checkpoint, or one of another model.
  """
  scheme, _, rest = resolved_weights(config).partition(":")
  workdir, step = _run_and_step(rest)
  if scheme != "run" or step is None:
    return None
  folder = f"{workdir}/checkpoints"
  saved = reader.read_meta(folder, step).get("lora")
  if saved is None:
    return None
  under = saved.pop("weights")
  settings = LoraConfig(**saved | {"targets": tuple(saved["targets"])})
  shapes = lora.abstract_adapters(config.model_config, settings)
  adapters, _ = reader.restore_params(
    folder, step, _placed_shapes(mesh, shapes)
  )
  return adapters, settings, under


def _merged(
  config: run_config.Config,
  mesh: Mesh,
  adapters: dict,
  settings: LoraConfig,
  under: str,
) -> dict:
  """The parameters `under` some adapters, with these in them."""
  model = dataclasses.replace(config.model, weights=under)
  try:
    params = initial_params(dataclasses.replace(config, model=model), mesh)
  except (OSError, ValueError) as error:
    raise ValueError(
      f"model.weights ({config.model.weights!r}) is a run that saved adapters "
      f"alone, and {under!r}, which they belong to, cannot be read: {error}"
    ) from error
  merge = jax.jit(
    lora.merge_adapters,
    static_argnums=2,
    donate_argnums=0,
    out_shardings=jax.tree.map(lambda x: x.sharding, params),
  )
  return merge(params, adapters, settings)


def _placed_shapes(mesh: Mesh, tree: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    sharding.param_shardings(mesh, tree),
  )


def _on_mesh(values: dict, abstract: dict) -> dict:
  """Arrays of this host's memory, in the places of the shapes."""
  return jax.tree.map(
    lambda x, shape: jax.make_array_from_callback(
      x.shape, shape.sharding, lambda index, x=x: x[index]
    ),
    values,
    abstract,
  )


def resolved_weights(config: run_config.Config) -> str:
  """`model.weights` with the step it means now, which it must keep meaning.

  Raises:
    ValueError: The run named has no checkpoint.
  """
  scheme, _, rest = config.model.weights.partition(":")
  if scheme != "run":
    return config.model.weights
  workdir, step = _run_and_step(rest)
  if step is None:
    step = reader.newest_step(f"{workdir}/checkpoints")
  return f"run:{workdir}@{step}"


def _run_and_step(rest: str) -> tuple[str, int | None]:
  """`WORKDIR[@STEP]`, taken apart; a workdir may have an @ of its own."""
  workdir, at, step = rest.rpartition("@")
  if at and step.isdecimal():
    return workdir, int(step)
  return rest, None
