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
from grpo_tpu.checkpoint import load, networks
from grpo_tpu.checkpoint.frozen import abstract_frozen
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import sharding
from grpo_tpu.distributed.hardware import Topology
from grpo_tpu.models import scores
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3.embedding import output_embedding
from grpo_tpu.models.settings import ModelSettings
from grpo_tpu.planning.changes import data_shards
from grpo_tpu.rewards import judge, model
from grpo_tpu.rl import learner, masters, pictures, score
from grpo_tpu.rl.train_batch import TrainBatch
from grpo_tpu.rl.train_state import TrainState
from grpo_tpu.rollout import compaction, engine
from grpo_tpu.rollout.sampler import Sampler


class Program(NamedTuple):
  """A jitted function with abstract arguments.

  Attributes:
    name: The name in the report, one of `names`.
    function: The jitted function.
    args: Shapes with shardings, or static values.
    parts: The shapes among the arguments by class: "params", "masters",
      "optimizer", "reference", "caches" and "batch".
    kwargs: Static values.
    kept: Other shapes that stay on the devices while the program runs, besides
      the resident ones.
    while_trips: Trips of loops that end when every row has ended, the outermost
      first.
    tokens: Completion tokens of one call, over all rows.
  """

  name: str
  function: Any
  args: tuple
  parts: dict[str, Any]
  kwargs: dict[str, Any] = {}
  kept: Any = ()
  while_trips: tuple[int, ...] = ()
  tokens: int = 0

  def trace(self, mesh: Mesh) -> Any:
    """Traces the function for the devices of a mesh."""
    with jax.set_mesh(mesh):
      return self.function.trace(*self.args, **self.kwargs)

  def bytes_by_class(self) -> dict[str, int]:
    """Bytes of one device that each class of arguments takes."""
    return {name: device_bytes(tree) for name, tree in self.parts.items()}

  def rest_bytes(self, results: Any, mesh: Mesh) -> int:
    """Bytes of one device for results and for arguments except weights."""
    leaves = jax.tree.leaves(results)
    total = sum(math.prod(x.shape) * _item_bytes(x) for x in leaves)
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
      f"{name} ({x})": True for name in reward_networks(config) for x in kinds
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


@functools.cache
def reward_networks(config: Config) -> dict[str, ModelSettings]:
  """The settings of reward models, judges and the teacher by name."""
  rewards, policy = config.rewards, config.model
  found = model.read_models(rewards, policy)
  found += [
    policy
    if weights == "self"
    else networks.read_settings(weights, policy, setting="rewards.judges")
    for weights, *_ in rewards.judges
  ]
  named = dict(zip(rewards.network_weights, found, strict=True))
  return named | ({"teacher": config.teacher} if config.distills else {})


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


def device_bytes(tree: Any) -> int:
  """Bytes of one device's HBM that a tree of sharded shapes takes."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * _item_bytes(x)
    for x in jax.tree.leaves(tree)
    if getattr(x, "sharding", None) is not None
    and x.sharding.memory_kind != "pinned_host"
  )


def _item_bytes(x: Any) -> int:
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return 8 if is_key else x.dtype.itemsize


def resident_bytes(config: Config) -> dict[str, int]:
  """Bytes per device that stay between programs, by class; needs no device.

  With LoRA the frozen base counts as parameters, and is the reference too.
  """
  mesh = cast(Mesh, sharding.abstract_mesh(**dataclasses.asdict(config.mesh)))
  state, frozen = _abstract_state(config, mesh)
  reference = None
  if config.needs_start and not config.lora:
    reference = _abstract_reference(config, mesh, config.model.reference_memory)
  memory = config.rewards.network_memory
  # Judges with the same weights share them, and "self" is the reference.
  found = dict(reward_networks(config))
  teacher = found.pop("teacher", None)
  loaded = {x.weights: x for x in found.values()}
  loaded.pop(config.model.weights, None)
  kept = [_abstract_network(config, x, mesh, memory) for x in loaded.values()]
  teachers = [
    _abstract_network(config, x, mesh, memory) for x in (teacher,) if x
  ]
  return {
    "params": device_bytes((state.params, frozen)),
    **{k: device_bytes(x) for k, x in _optimizer_parts(state).items()},
    "reference": device_bytes(reference),
    **({"rewards": device_bytes(kept)} if kept else {}),
    **({"teacher": device_bytes(teachers)} if teachers else {}),
  }


def _abstract_network(
  config: Config, network: ModelSettings, mesh: Mesh, memory: str = "device"
) -> dict:
  dtype = config.rewards.network_dtype or network.param_dtype
  return abstract_frozen(network, mesh, dtype=dtype, memory=memory)


def _abstract_reference(
  config: Config, mesh: Mesh, memory: str = "device"
) -> dict:
  dtype = config.model.reference_type
  return abstract_frozen(config.model, mesh, dtype=dtype, memory=memory)


def _abstract_state(
  config: Config, mesh: Mesh
) -> tuple[TrainState, dict | None]:
  """The state, and the frozen base under LoRA's adapters."""
  tx = learner.policy_optimizer(config.model, config.optimizer_config)
  state = learner.abstract_state(config.model, mesh, tx)
  frozen = load.abstract_params(config.model, mesh) if config.lora else None
  return state, frozen


def _optimizer_parts(state: TrainState) -> dict[str, Any]:
  """The optimizer's state by class; "masters" only if parameters have any."""
  if isinstance(state.opt_state, masters.MastersState):
    return state.opt_state._asdict()
  return {"optimizer": state.opt_state}


def find(config: Config, mesh: Mesh, name: str) -> Program:
  """The program with this name, one of `names`."""
  programs = _AbstractPrograms(config, mesh, name)
  if is_network(name):
    return programs.network()
  match step_of(name).removeprefix("evaluation_"):
    case "pictures":
      return programs.encode_images()
    case "score":
      return programs.score()
    case "train_step":
      return programs.update()
  return programs.rollout()


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
    self._state, self._frozen = _abstract_state(config, mesh)
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
    """Scores a batch under the reference or the current parameters."""
    config, params, part = self._config, self._run_params(), "params"
    if config.has_reference and not config.lora:
      part = "reference"
      params = _abstract_reference(config, self._mesh)
    prompts, parts = config.data.prompts_per_step, config.num_microbatches
    if self._is_evaluation:  # Scores its batch in one part.
      prompts, parts = config.eval.batch_size, 1
    bundles = self._bundles(prompts)
    return Program(
      self._name,
      score.score_batch,
      args=(self._sampler.forward, params, bundles),
      kwargs={"num_microbatches": parts},
      parts={part: params, "batch": bundles},
      tokens=math.prod(bundles.completion_ids.shape),
    )

  def network(self) -> Program:
    """Scores completions with a reward model or a judge."""
    config, name = self._config, step_of(self._name)
    network, data = reward_networks(config)[name], config.data
    params = _abstract_network(config, network, self._mesh)
    forward = model.network_forward(network, self._mesh)
    images, prompts = data.images_per_prompt, data.prompts_per_step
    is_judge, part = name.startswith("judge_"), "rewards"
    if network == config.model:
      part = "params" if config.lora else "reference"
    if name == "teacher":
      part = "teacher"
    vision, scorer = network.network.vision, scores.scores
    longest = data.prompt_buckets[-1], config.rollout.max_new_tokens
    if is_judge:
      scorer = functools.partial(judge.share_of_yes, words=((1,), (2,)))
      room = judge.ANSWER_TOKENS  # And that of a template, about.
      longest = [judge.lengths(x + room)[-1] for x in longest]
    shape = longest[0], images * self._has_images if vision else 0
    sizes = completions_per_prompt(config), longest[1]
    bundles = model.abstract_bundles(
      network, self._mesh, shape, prompts, *sizes
    )
    if is_judge:  # It reads pixels, and lengths instead of a mask.
      ids, length, shown, completions, _ = bundles
      if vision:
        sides = [vision.shown_size] * 2
        shown = self._array(jnp.uint8, prompts, shape[1], *sides, 3)
      each = self._array(jnp.int32, prompts, sizes[0])
      bundles = ids, length, shown, completions, each
    scorer = functools.partial(scorer, forward)
    at_once = config.train.microbatch_bundles
    program = jax.jit(functools.partial(model.score_parts, scorer, at_once))
    args = params, *bundles
    if name == "teacher":
      kwargs = {"num_microbatches": config.num_microbatches}
      program = functools.partial(score.score_batch, forward, **kwargs)
      program = jax.jit(functools.partial(program, gives_states=True))
      bundles = self._bundles(prompts).replace(teacher_states=None)
      args = params, bundles
    return Program(
      self._name,
      program,
      args=args,
      parts={part: params, "batch": bundles},
      tokens=prompts * math.prod(sizes),
    )

  def update(self) -> Program:
    """Updates the parameters once."""
    config, state, frozen = self._config, self._state, self._frozen
    bundles = self._bundles(config.data.prompts_per_step)
    teacher = None
    if config.distills:
      teacher = _abstract_network(config, config.teacher, self._mesh)
      teacher = output_embedding(teacher)
    trainer = learner.Learner(
      config.model, self._sampler.forward, self._mesh, config.learner_config
    )
    return Program(
      self._name,
      trainer.update,
      args=(state, bundles, frozen, teacher),
      parts={
        "params": (state.params, frozen),
        **_optimizer_parts(state),
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
