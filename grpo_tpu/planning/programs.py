"""The programs of a run with abstract arguments, for a plan to compile.

They are the functions that training runs, on devices that need not exist. Of
each program only the largest size is planned: prompts as long as the longest
bucket, completions of full length, and no row that has ended. Prompts are text
alone, or all have `data.images_per_prompt`; "mixed" ones show half of these.
"""

import dataclasses
import functools
import math
import types
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from data_pipelines.text import tokenizer as tokens
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import sharding
from grpo_tpu.distributed.hardware import Topology
from grpo_tpu.models import scores
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3.embedding import output_embedding
from grpo_tpu.planning import arrays
from grpo_tpu.planning.changes import data_shards
from grpo_tpu.rewards import judge, model
from grpo_tpu.rl import learner, pictures, score
from grpo_tpu.rl.train_batch import TrainBatch
from grpo_tpu.rollout import compaction, engine
from grpo_tpu.rollout.sampler import Sampler


class Program(NamedTuple):
  """A jitted function with abstract arguments."""

  name: str  # In the report, one of `names`.
  function: Any
  args: tuple  # Shapes with shardings, or static values.
  # The shapes among the arguments by class: those of `resident_bytes`, "caches"
  # and "batch".
  parts: dict[str, Any]
  kwargs: dict[str, Any] = {}  # Static values.
  kept: Any = ()  # Other shapes on the devices, besides the resident ones.
  # Of loops that end when every row has ended, the outermost first.
  while_trips: tuple[int, ...] = ()
  tokens: int = 0  # Completion tokens of one call, over all rows.

  def trace(self, mesh: Mesh) -> Any:
    """Traces the function for the devices of a mesh."""
    with jax.set_mesh(mesh):
      return self.function.trace(*self.args, **self.kwargs)

  def bytes_by_class(self) -> dict[str, int]:
    """Bytes of one device that each class of arguments takes."""
    return {
      name: arrays.device_bytes(tree) for name, tree in self.parts.items()
    }

  def rest_bytes(self, results: Any, mesh: Mesh) -> int:
    """Bytes of one device for results and for arguments except weights."""
    leaves = jax.tree.leaves(results)
    total = sum(math.prod(x.shape) * arrays.item_bytes(x) for x in leaves)
    sizes = self.bytes_by_class()
    weights = "params", "rewards"
    rest = sum(x for name, x in sizes.items() if name not in weights)
    return rest + total // mesh.devices.size


def names(config: Config) -> list[str]:
  """The programs of a run: those of a step in its order, then evaluation's."""
  has_vision = bool(config.model_config.vision)
  kinds = ["text", "image"] if has_vision else ["text"]
  # A trained tower runs apart from the microbatches if prompts differ.
  differ = config.data.images_per_prompt > 1 and config.model.train_vision
  updates = [*kinds, "mixed"] if differ else kinds
  chunk, new = config.rollout.chunk_tokens, config.rollout.max_new_tokens
  kind = config.data.kind
  is_online, is_evaluated = kind == "online", bool(config.eval.every_steps)
  is_policy = not config.objective.is_reward_model
  is_answered = is_evaluated and is_policy
  # Rollouts read encoded images, and so do updates that do not train the tower.
  reads_features = is_online or is_answered or not config.model.train_vision
  # A step may score its batch before the first update.
  is_scored = (
    is_policy
    and kind != "demonstrations"
    and (
      config.has_reference
      or config.train.num_iterations > 1
      or config.shaping.top_entropy_share < 1
    )
  )
  needed = {
    "pictures (image)": has_vision and reads_features,
    # Only prefill reads images; later programs read the prompt's cache.
    **{f"prefill ({x})": is_online for x in kinds},
    "decode_chunk": is_online and new > 1,
    # Rows can move only if decoding takes more than one chunk.
    "move": is_online and chunk < new - 1,
    "results": is_online,
    **{f"score ({x})": is_scored for x in updates},
    **{f"train_step ({x})": True for x in updates},
    **{
      f"{name} ({x})": True
      for name in arrays.reward_networks(config)
      for x in kinds
    },
    f"evaluation_prefill ({kinds[-1]})": is_answered,
    "evaluation_decode": is_answered and new > 1,
    f"evaluation_score ({kinds[-1]})": is_evaluated and kind == "preference",
  }
  return [name for name, is_needed in needed.items() if is_needed]


def step_of(name: str) -> str:
  """A program's name without the kind of its prompts."""
  return name.partition(" ")[0]


def part_of(name: str) -> str:
  """The part of a run that a program belongs to, one of four.

  For each of "pictures", "rollout", "evaluation" and "update", a setting of its
  own decides how much runs together.
  """
  step = step_of(name)
  if step in ("score", "train_step") or is_network(name):
    return "update"
  if step.startswith("evaluation"):
    return "evaluation"
  return step if step == "pictures" else "rollout"


def is_network(name: str) -> bool:
  """True for the program of a reward model, judge or teacher, by its name."""
  return name.startswith(("model_", "judge_", "teacher"))


def reads_pixels(config: Config, name: str) -> bool:
  """True if a program reads images of `model.image_size`."""
  if step_of(name) == "pictures" or name == "teacher (image)":
    return True
  scores = part_of(name) == "update" or step_of(name) == "evaluation_score"
  return scores and config.model.train_vision and "(text)" not in name


def completions_per_prompt(config: Config) -> int:
  """Completions in each bundle of a training batch."""
  widths = {
    "online": config.rollout.num_generations,
    "preference": config.data.preference_completions,
  }
  return widths.get(config.data.kind, 1)


def described_mesh(config: Config, topology: Topology) -> Mesh:
  """The run's mesh on a slice that need not exist.

  Raises:
    ValueError: The mesh does not cover the slice.
  """
  chip = topology.chip
  slices = topology.num_slices
  devices = topologies.get_topology_desc(
    platform="tpu",
    topology_name=f"{chip.name}:{topology.shape}",
    **({"num_slices": slices} if slices > 1 else {}),
  ).devices
  return sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)


def resident_bytes(config: Config) -> dict[str, int]:
  """Bytes per device that stay between programs, by class; needs no device.

  With LoRA the frozen base counts as parameters, and is the reference too.
  """
  mesh = cast(Mesh, sharding.abstract_mesh(**dataclasses.asdict(config.mesh)))
  state, frozen = arrays.abstract_state(config, mesh)
  reference, kept = None, {}
  if config.needs_start and not config.lora:
    memory = config.model.reference_memory
    reference = arrays.abstract_reference(config, mesh, memory)
  for name, network in arrays.reward_networks(config).items():
    part = "teacher" if name == "teacher" else "rewards"
    # Judges with the same weights share them, and "self" is the reference.
    if part == "teacher" or network.weights != config.model.weights:
      memory = config.rewards.network_memory
      params = arrays.abstract_network(config, network, mesh, memory)
      kept.setdefault(part, {})[network.weights] = params
  parts = {"params": (state.params, frozen), "reference": reference, **kept}
  parts |= arrays.optimizer_parts(state)
  return {name: arrays.device_bytes(tree) for name, tree in parts.items()}


def find(config: Config, mesh: Mesh, name: str) -> Program:
  """The program with this name, one of `names`."""
  programs = _AbstractPrograms(config, mesh, name)
  makers = {
    "pictures": programs.encode_images,
    "score": programs.score,
    "teacher": programs.score,
    "train_step": programs.update,
  }
  others = programs.network if is_network(name) else programs.rollout
  return makers.get(step_of(name).removeprefix("evaluation_"), others)()


class _ScalableShape(jax.ShapeDtypeStruct):
  """A shape that can be multiplied by a number, and stays the same."""

  def __mul__(self, _: float) -> "_ScalableShape":
    return self

  __rmul__ = __mul__


class _AbstractPrograms:
  """Makes the programs of a run with the arguments that `name` needs."""

  def __init__(self, config: Config, mesh: Mesh, name: str):
    """Makes the abstract state; compiles nothing."""
    self._config, self._mesh, self._name = config, mesh, name
    self._is_evaluation = part_of(name) == "evaluation"
    self._has_images = "(image)" in name or "(mixed)" in name
    self._state, self._frozen = arrays.abstract_state(config, mesh)
    vision = config.model_config.vision
    # The sampler reads nothing else of a tokenizer.
    marks = types.SimpleNamespace(
      start_of_image=vision.start_of_image if vision else 0,
      end_of_image=vision.end_of_image if vision else 0,
    )
    self._sampler = Sampler(
      config.model, config.rollout, mesh, cast(tokens.Tokenizer, marks)
    )

  def encode_images(self) -> Program:
    """Encodes images with the tower."""
    encoder = self._sampler.image_encoder
    assert encoder is not None
    tower = self._run_params()["vision_encoder"]
    pixels = encoder.abstract_pixels()
    parts = {"params": tower, "batch": pixels}
    return Program(self._name, encoder.encode, (tower, pixels), parts)

  def rollout(self) -> Program:
    """One of the rollout's programs, which run one after the other."""
    config, rollout = self._config, self._config.rollout
    name, step = self._name, step_of(self._name)
    num_prompts = config.data.prompts_per_step // config.num_rollouts
    sampling = {
      "num_completions": rollout.num_generations,
      "temperature": rollout.temperature,
    }
    if self._is_evaluation:
      num_prompts, sampling = config.eval.batch_size, config.eval.ways[-1]
    num_rows = sampling["num_completions"]
    functions = engine.Engine(
      self._sampler.engine_settings(**sampling), self._mesh
    )
    params, prompts = self._run_params(), self._abstract_prompts(num_prompts)
    limit = self._array(jnp.int32, num_prompts, num_rows)
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = params, prompts, limit, key
    if step.endswith("prefill"):
      parts = {"params": params, "batch": prompts}
      return Program(name, functions.prefill, args, parts)
    state = functions.abstract_state(*args)
    if step == "results":
      args, parts = (state.output, limit), {"batch": state.output}
      kept = state.replace(output=None), prompts  # The caches still exist.
      return Program(name, functions.results, args, parts, kept=kept)
    if step == "move":
      shards = data_shards(config)
      # The largest grid that rows can move into.
      shapes = compaction.ladder(num_prompts // shards, num_rows)
      bundles, width = shapes[min(1, len(shapes) - 1)]
      rows = self._array(jnp.int32, shards * bundles, width)
      args = state, rows, rows, self._array(jnp.int32, shards * bundles)
      parts = {"caches": state}
      return Program(name, functions.move_rows, args, parts, kept=prompts)
    # The loop over tokens, and in it the one over a period's local layers.
    num_tokens = min(rollout.chunk_tokens, rollout.max_new_tokens - 1)
    return Program(
      name,
      functions.decode_chunk,
      args=(params, state, self._array(bool, num_prompts, num_rows)),
      parts={"params": params, "caches": state},
      kept=prompts,
      while_trips=(num_tokens, gemma3_config.PERIOD - 1),
    )

  def score(self) -> Program:
    """Scores a batch under the reference, the policy or the teacher."""
    config, params, part = self._config, self._run_params(), "params"
    prompts, parts = config.data.prompts_per_step, config.num_microbatches
    if self._is_evaluation:  # Scores its batch in one part.
      prompts, parts = config.eval.batch_size, 1
    bundles, forward = self._bundles(prompts), self._sampler.forward
    kwargs: dict[str, Any] = {"num_microbatches": parts}
    if is_network(self._name):
      part, kwargs = "teacher", kwargs | {"gives_states": True}
      params = arrays.abstract_network(config, config.teacher, self._mesh)
      forward = model.network_forward(config.teacher, self._mesh)
      bundles = bundles.replace(teacher_states=None)
    elif config.has_reference and not config.lora:
      part = "reference"
      params = arrays.abstract_reference(config, self._mesh)
    return Program(
      self._name,
      score.score_batch,
      args=(forward, params, bundles),
      kwargs=kwargs,
      parts={part: params, "batch": bundles},
      tokens=math.prod(bundles.completion_ids.shape),
    )

  def network(self) -> Program:
    """Scores completions with a reward model or a judge."""
    config, name = self._config, step_of(self._name)
    network, data = arrays.reward_networks(config)[name], config.data
    params = arrays.abstract_network(config, network, self._mesh)
    part, scorer = "rewards", scores.scores
    if network == config.model:
      part = "params" if config.lora else "reference"
    vision, prompts = network.network.vision, data.prompts_per_step
    longest = [data.prompt_buckets[-1], config.rollout.max_new_tokens]
    is_judge = name.startswith("judge_")
    if is_judge:
      scorer = functools.partial(judge.share_of_yes, words=((1,), (2,)))
      room = judge.ANSWER_TOKENS  # And that of a template, about.
      longest = [judge.lengths(x + room)[-1] for x in longest]
    images = data.images_per_prompt * self._has_images if vision else 0
    shape, width = (longest[0], images), completions_per_prompt(config)
    bundles = model.abstract_bundles(
      network, self._mesh, shape, prompts, width, longest[1]
    )
    if is_judge:  # It reads pixels, and lengths instead of a mask.
      ids, length, shown, completions, _ = bundles
      if vision:
        sides = [vision.shown_size] * 2
        shown = self._array(jnp.uint8, prompts, images, *sides, 3)
      each = self._array(jnp.int32, prompts, width)
      bundles = ids, length, shown, completions, each
    scorer = functools.partial(
      scorer, model.network_forward(network, self._mesh)
    )
    at_once = config.train.microbatch_bundles
    return Program(
      self._name,
      jax.jit(functools.partial(model.score_parts, scorer, at_once)),
      args=(params, *bundles),
      parts={part: params, "batch": bundles},
      tokens=prompts * width * longest[1],
    )

  def update(self) -> Program:
    """Updates the parameters once."""
    config, state, frozen = self._config, self._state, self._frozen
    bundles = self._bundles(config.data.prompts_per_step)
    teacher = None
    if config.distills:
      teacher = output_embedding(
        arrays.abstract_network(config, config.teacher, self._mesh)
      )
    trainer = learner.Learner(
      config.model, self._sampler.forward, self._mesh, config.learner_config
    )
    return Program(
      self._name,
      trainer.update,
      args=(state, bundles, frozen, teacher),
      parts={
        "params": (state.params, frozen),
        **arrays.optimizer_parts(state),
        **({"teacher": teacher} if config.distills else {}),
        "batch": bundles,
      },
      tokens=math.prod(bundles.completion_ids.shape),
    )

  def _run_params(self) -> dict:
    """The parameters that run the network, LoRA's adapters included."""
    if self._frozen is None:
      return self._state.params
    factors = jax.tree.map(
      lambda x: _ScalableShape(x.shape, x.dtype, sharding=x.sharding),
      self._state.params,
    )
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      learner.forward_params(self._config.model, factors, self._frozen),
    )

  def _abstract_prompts(self, num_prompts: int) -> engine.Prompts:
    data = self._config.data
    images = data.images_per_prompt if self._has_images else 0
    length = data.prompt_buckets[-1]
    return self._sampler.abstract_prompts(num_prompts, length, images)

  def _array(self, dtype: Any, *shape: int) -> Any:
    return sharding.abstract_batch(self._mesh, dtype, *shape)

  def _bundles(self, prompts: int) -> TrainBatch:
    config, kind = self._config, self._config.data.kind
    kind = "pairs" if config.objective.is_reward_model else kind
    width, new = completions_per_prompt(config), config.rollout.max_new_tokens
    asked = self._abstract_prompts(prompts)
    images, vision = asked.images, config.model_config.vision
    if vision and reads_pixels(config, self._name):
      side = vision.shown_size
      shape = (asked.images.shape[1], side, side, 3)
      images = self._array(jnp.uint8, prompts, *shape)
    number = self._array(jnp.float32, prompts, width)
    logps = self._array(jnp.float32, prompts, width, new)
    is_old = kind == "preference" or config.train.num_iterations > 1
    share = config.shaping.top_entropy_share
    has_weights = share < 1 and kind in ("online", "preference")
    states = None
    if config.distills:
      shape = prompts, width, new, config.teacher.network.embed_dim
      states = self._array(self._sampler.forward.dtype, *shape)
    preferred = self._array(jnp.bool_, prompts, width, width)
    batch = TrainBatch(
      prompt_ids=asked.ids,
      prompt_length=asked.length,
      images=images,
      completion_ids=self._array(jnp.int32, prompts, width, new),
      completion_mask=self._array(jnp.bool_, prompts, width, new),
      advantages=number if kind != "pairs" else None,
      old_per_token_logps=logps if is_old and kind != "pairs" else None,
      ref_per_token_logps=logps if config.has_reference else None,
      sampler_logps=logps if kind == "online" else None,
      token_weights=logps if has_weights else None,
      teacher_states=states,
      preferred=preferred if kind == "preference" else None,
      labels=number if kind == "pairs" else None,
    )
    if "(mixed)" not in self._name:
      return batch
    half = prompts * config.data.images_per_prompt // 2
    return pictures.with_num_encoded(batch, self._mesh, half)
