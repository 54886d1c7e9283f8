"""The model of a run, on its mesh: loaded once, sampled and scored by all.

Settings become static arguments here, so that training and evaluation run the
same programs.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_pipelines import pipeline
from data_pipelines import tokenizer as tokens
from grpo_tpu import checkpoint, rollout, sharding, train_step
from grpo_tpu import config as run_config
from grpo_tpu.gemma3 import attention, weights


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
  def model(self) -> train_step.Model:
    """How the network is run in training and scoring."""
    return train_step.Model(
      config=self.config.model_config,
      dtype=jnp.dtype(self.config.model.compute_dtype),
      remat=self.config.model.remat,
      temperature=self.config.rollout.temperature,
      chunk_size=self.config.model.logits_chunk,
      train_vision=self.config.model.train_vision,
      vision_remat=self.config.model.vision_remat,
      banned_ids=self.banned_ids,
      attention=attention.implementation(
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

  def abstract_params(self) -> dict:
    """Shapes, types and places of the parameters."""
    tree = weights.abstract_params(
      self.config.model_config, jnp.dtype(self.config.model.param_dtype)
    )
    return self.placed_shapes(tree)

  def placed_shapes(self, tree: Any) -> Any:
    """The shapes of a tree with the places that the rules give them."""
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      sharding.shardings(self.mesh, tree),
    )

  def initial_params(self) -> dict:
    """The parameters that `model.weights` names, on the mesh.

    Raises:
      ValueError: The run named has no such checkpoint, or one of another model.
    """
    scheme, _, rest = self.config.model.weights.partition(":")
    abstract = self.abstract_params()
    if scheme == "run":
      workdir, step = _run_and_step(rest)
      params, _ = checkpoint.restore_params(
        f"{workdir}/checkpoints", step, abstract
      )
      return params
    values = weights.random_params(
      self.config.model_config,
      int(rest),
      np.dtype(self.config.model.param_dtype),
    )
    return jax.tree.map(
      lambda x, shape: jax.make_array_from_callback(
        x.shape, shape.sharding, lambda index, x=x: x[index]
      ),
      values,
      abstract,
    )

  def sample(
    self,
    params: dict,
    batch: pipeline.Batch,
    step_key: jax.Array,
    *,
    num_completions: int,
    temperature: float,
  ) -> rollout.Completions:
    """Completions of this process's prompts, as global arrays."""
    arrays = sharding.put_batch(
      self.mesh,
      (
        batch.prompt_ids,
        batch.prompt_length,
        batch.images,
        batch.prompt_index,
      ),
    )
    return rollout.rollout(
      params,
      *arrays,
      step_key,
      config=self.config.model_config,
      num_completions=num_completions,
      max_new_tokens=self.config.rollout.max_new_tokens,
      temperature=temperature,
      dtype=self.model.dtype,
      attention=self.model.attention,
      banned_ids=self.banned_ids,
    )

  def texts(self, completions: rollout.Completions) -> list[list[str]]:
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
    step = checkpoint.newest_step(f"{workdir}/checkpoints")
  return f"run:{workdir}@{step}"


def _run_and_step(rest: str) -> tuple[str, int | None]:
  """`WORKDIR[@STEP]`, taken apart; a workdir may have an @ of its own."""
  workdir, at, step = rest.rpartition("@")
  if at and step.isdecimal():
    return workdir, int(step)
  return rest, None
