"""Every program of a run, as shapes: what a plan compiles.

The same functions that training runs, on devices that are described and not
there. Of those that come in sizes, the largest, for memory is booked for these:
prompts are as long as the longest bucket, completions as long as they may be,
and no row has ended yet.
"""

import copy
import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from data_pipelines.text import tokenizer as tokens
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import hardware, sharding
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.rl import policy as policies
from grpo_tpu.rl import score
from grpo_tpu.rl.train_batch import TrainBatch
from grpo_tpu.rollout import compaction, engine

# What lies on the devices from step to step, whatever runs.
RESIDENT = ("params", "optimizer", "reference")

# Of a run; each has a setting of its own for how much it does at a time.
PARTS = ("pictures", "rollout", "evaluation", "update")


class Program(NamedTuple):
  """One jitted function with what it would be called with.

  Attributes:
    name: As the report shows it.
    function: Jitted.
    args: Shapes with places, or static values.
    kwargs: Likewise.
    parts: The shapes among them by class: those of `RESIDENT`, "caches", and
      "batch".
    kept: Shapes that lie beside them while it runs, besides what is resident.
    while_trips: Of loops that end when every row has, and of those inside.
    tokens: Completion tokens of a call, over all rows.
  """

  name: str
  function: Any
  args: tuple
  kwargs: dict[str, Any]
  parts: dict[str, Any]
  kept: Any = ()
  while_trips: tuple[int, ...] = ()
  tokens: int = 0

  def traced(self, mesh: Mesh) -> Any:
    """The function traced for the devices of a mesh."""
    with jax.set_mesh(mesh):
      return self.function.trace(*self.args, **self.kwargs)

  def bytes_by_class(self) -> dict[str, int]:
    """Bytes of one device that each class of arguments takes."""
    return {name: device_bytes(tree) for name, tree in self.parts.items()}

  def rest_bytes(self, results: Any, mesh: Mesh) -> int:
    """Bytes of one device read and written once, the weights left out."""
    given = self.bytes_by_class()
    total = sum(
      math.prod(x.shape) * _item_bytes(x) for x in jax.tree.leaves(results)
    )
    rest = sum(size for name, size in given.items() if name != "params")
    return rest + total // mesh.devices.size


class _Marks:
  """Stands for a tokenizer, of which programs want two ids alone."""

  def __init__(self, config: run_config.Config):
    vision = config.model_config.vision
    self.start_of_image = vision.start_of_image if vision else 0
    self.end_of_image = vision.end_of_image if vision else 0


def described_mesh(
  config: run_config.Config, topology: hardware.Topology
) -> Mesh:
  """The run's mesh on a slice that need not exist.

  Raises:
    ValueError: The mesh does not multiply out to the slice's devices.
  """
  chip = topology.chip
  described = topologies.get_topology_desc(
    platform="tpu",
    topology_name=f"{chip.name}:{topology.shape}",
    **({"num_slices": topology.num_slices} if topology.num_slices > 1 else {}),
  )
  return sharding.make_mesh(
    **dataclasses.asdict(config.mesh), devices=described.devices
  )


def device_bytes(tree: Any) -> int:
  """Bytes of one device that a tree of shapes with places takes."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * _item_bytes(x)
    for x in jax.tree.leaves(tree)
    if getattr(x, "sharding", None) is not None
    and x.sharding.memory_kind != "pinned_host"
  )


def _item_bytes(x: Any) -> int:
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return 8 if is_key else x.dtype.itemsize


def names(config: run_config.Config) -> list[str]:
  """The programs of a run: those of a step in its order, then evaluation's."""
  kinds = ["text"]
  if config.model_config.vision:
    kinds.append("image")
  planned, is_online = [], config.data.kind == "online"
  # A rollout reads what the tower makes of pictures, and so does an update
  # unless it trains the tower.
  rolls_out = is_online or bool(config.eval.every_steps)
  if config.model_config.vision and (
    rolls_out or not config.model.train_vision
  ):
    planned.append("pictures (image)")
  if is_online:
    # Only what reads prompts reads images: what they show is in its cache.
    planned += [f"prefill ({kind})" for kind in kinds]
    planned += [] if config.rollout.max_new_tokens == 1 else ["decode_chunk"]
    planned += ["move"] * _has_moves(config) + ["results"]
  if has_scoring(config):
    planned += [f"score ({kind})" for kind in kinds]
  planned += [f"train_step ({kind})" for kind in kinds]
  if config.eval.every_steps:
    planned += [f"evaluation_prefill ({kind})" for kind in kinds[-1:]]
    if config.rollout.max_new_tokens > 1:
      planned.append("evaluation_decode")
    if config.data.kind == "preference":
      planned += [f"evaluation_score ({kind})" for kind in kinds[-1:]]
  return planned


def step_of(name: str) -> str:
  """The name of a program without what it reads."""
  return name.partition(" ")[0]


def part_of(name: str) -> str:
  """What a program of `names` belongs to: one of `PARTS`."""
  step = step_of(name)
  if step in ("score", "train_step"):
    return "update"
  if step.startswith("evaluation"):
    return "evaluation"
  return step if step == "pictures" else "rollout"


def reads_pixels(config: run_config.Config, name: str) -> bool:
  """Whether a program of `names` has pictures of `model.image_size`."""
  if step_of(name) == "pictures":
    return True
  scores = part_of(name) == "update" or step_of(name) == "evaluation_score"
  return scores and config.model.train_vision and "(image)" in name


def _has_moves(config: run_config.Config) -> bool:
  """Whether rows may move together before they have all ended."""
  settings = config.rollout
  return settings.chunk_tokens < settings.max_new_tokens - 1


def has_scoring(config: run_config.Config) -> bool:
  """Whether another policy, or this one at another time, scores the batch."""
  if config.data.kind == "demonstrations":
    return False
  return (
    config.has_reference
    or config.train.num_iterations > 1
    or config.shaping.top_entropy_share < 1
  )


def find(config: run_config.Config, mesh: Mesh, name: str) -> Program:
  """The program of that name, one of `names`."""
  kind = name.partition(" ")[2]
  policy = policies.Policy(config, mesh, cast(tokens.Tokenizer, _Marks(config)))
  made = _Made(policy, with_images=kind == "(image)")
  make = {
    "pictures": made.pictures,
    "prefill": made.prefill,
    "decode_chunk": made.decode_chunk,
    "move": made.move,
    "results": made.results,
    "score": made.score,
    "train_step": made.update,
    "evaluation_prefill": made.evaluating().prefill,
    "evaluation_decode": made.evaluating().decode_chunk,
    "evaluation_score": made.evaluation_score,
  }[step_of(name)]
  return make(name)


def resident_bytes(config: run_config.Config) -> dict[str, int]:
  """What lies on a device from step to step, by class; no device is asked."""
  mesh = sharding.abstract_mesh(**dataclasses.asdict(config.mesh))
  marks = cast(tokens.Tokenizer, _Marks(config))
  made = _Made(policies.Policy(config, cast(Mesh, mesh), marks))
  return {name: device_bytes(tree) for name, tree in made.resident.items()}


class _Scaled(jax.ShapeDtypeStruct):
  """A shape that stays what it is when it is multiplied by a number."""

  def __mul__(self, _: float) -> "_Scaled":
    return self

  __rmul__ = __mul__


class _Made:
  """Makes the programs of one policy."""

  def __init__(self, policy: policies.Policy, *, with_images: bool = False):
    self._policy, self._config = policy, policy.config
    self._mesh = policy.mesh
    self._with_images = with_images
    config = policy.config
    # Of a rollout: prompts, completions of each, and how they are drawn.
    self._prompts_at_a_time = (
      config.data.prompts_per_step // config.num_rollouts
    )
    self._rows = config.rollout.num_generations
    self._temperature = config.rollout.temperature
    self._state = policy.abstract_state()
    self._frozen = policy.abstract_params() if self._config.lora else None

  @property
  def resident(self) -> dict[str, Any]:
    """By class; adapters are parameters, and so is what lies under them."""
    reference = None
    if self._config.has_reference and not self._config.lora:
      reference = self._policy.abstract_reference()
    return {
      "params": (self._state.params, self._frozen),
      "optimizer": self._state.opt_state,
      "reference": reference,
    }

  def _run_params(self) -> dict:
    """What runs the network; adapters' shapes where the adapters would go."""
    if self._frozen is None:
      return self._state.params
    factors = jax.tree.map(
      lambda x: _Scaled(x.shape, x.dtype, sharding=x.sharding),
      self._state.params,
    )
    made = self._policy.run_params(factors, self._frozen)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      made,
    )

  def evaluating(self) -> "_Made":
    """The same where rollouts are those of a greedy evaluation."""
    made = copy.copy(self)
    made._prompts_at_a_time = self._config.eval.batch_size
    made._rows, made._temperature = 1, 0.0
    return made

  def pictures(self, name: str) -> Program:
    """The tower's reading of some pictures."""
    encoder = self._policy.pictures
    assert encoder is not None
    tower = self._run_params()["vision_encoder"]
    pixels = encoder.abstract_pixels()
    return Program(
      name=name,
      function=encoder.encode,
      args=(tower, pixels),
      kwargs={},
      parts={"params": tower, "batch": pixels},
    )

  def prefill(self, name: str) -> Program:
    """Reads the prompts, and writes the first token of every row."""
    made, args = self._rollout()
    params, prompts, *_ = args
    return Program(
      name=name,
      function=made.prefill,
      args=args,
      kwargs={},
      parts={"params": params, "batch": prompts},
    )

  def decode_chunk(self, name: str) -> Program:
    """Some more tokens of every row, as long as all go on."""
    made, args = self._rollout()
    state = made.abstract_state(*args)
    settings, rows = self._config.rollout, self._prompts_at_a_time
    return Program(
      name=name,
      function=made.decode_chunk,
      args=(args[0], state, self._array(bool, self._rows, rows=rows)),
      kwargs={},
      parts={"params": args[0], "caches": state},
      kept=args[1],
      # Tokens, and in each the local layers between two global ones.
      while_trips=(
        min(settings.chunk_tokens, settings.max_new_tokens - 1),
        gemma3_config.PERIOD - 1,
      ),
    )

  def move(self, name: str) -> Program:
    """Rows that stand together, beside the places that they leave."""
    made, args = self._rollout()
    state = made.abstract_state(*args)
    shards = self._config.mesh.replica * self._config.mesh.fsdp
    shapes = compaction.ladder(self._prompts_at_a_time // shards, self._rows)
    bundles, width = shapes[min(1, len(shapes) - 1)]
    places = self._array(jnp.int32, width, rows=shards * bundles)
    moved = self._array(jnp.int32, rows=shards * bundles)
    return Program(
      name=name,
      function=made.move_rows,
      args=(state, places, places, moved),
      kwargs={},
      parts={"caches": state},
      kept=args[1],
    )

  def results(self, name: str) -> Program:
    """What has been written, beside the caches that are not wanted any more."""
    made, args = self._rollout()
    state = made.abstract_state(*args)
    cut = self._array(jnp.int32, self._rows, rows=self._prompts_at_a_time)
    return Program(
      name=name,
      function=made.results,
      args=(state.output, cut),
      kwargs={},
      parts={"batch": state.output},
      kept=(state.replace(output=None), args[1]),
    )

  def _rollout(self) -> tuple[Any, tuple]:
    """What samples completions, and what it is called with."""
    config, policy = self._config, self._policy
    prompts, new = self._prompts_at_a_time, config.rollout
    settings = engine.Settings(
      config=config.model_config,
      num_completions=self._rows,
      max_new_tokens=new.max_new_tokens,
      min_new_tokens=new.min_new_tokens,
      chunk_tokens=new.chunk_tokens,
      temperature=self._temperature,
      dtype=policy.model.dtype,
      attention=policy.model.attention,
      banned_ids=policy.banned_ids,
    )
    index = self._array(jnp.int32, rows=prompts)
    ids, length, images = self._prompts(prompts)
    params = self._run_params()
    key = jax.eval_shape(lambda: jax.random.key(0))
    limit = self._array(jnp.int32, self._rows, rows=prompts)
    return engine.Engine(settings, policy.mesh), (
      params,
      engine.Prompts(ids, length, images, index),
      limit,
      key,
    )

  def score(self, name: str) -> Program:
    """Log-probabilities of a batch under other parameters."""
    config = self._config
    bundles = self._bundles(config.data.prompts_per_step)
    return self._scoring(name, bundles, config.num_microbatches)

  def evaluation_score(self, name: str) -> Program:
    """The same of held-out labelled completions, all of a batch at once."""
    bundles = self._bundles(self._config.eval.batch_size)
    return self._scoring(name, bundles, 1)

  def _scoring(self, name: str, bundles: Any, num_microbatches: int) -> Program:
    config, policy = self._config, self._policy
    params, part = self._run_params(), "params"
    if config.has_reference and not config.lora:
      params, part = policy.abstract_reference(on_device=True), "reference"
    return Program(
      name=name,
      function=score.score_batch,
      args=(policy.model, params, bundles),
      kwargs={"num_microbatches": num_microbatches},
      parts={part: params, "batch": bundles},
      tokens=math.prod(bundles.completion_ids.shape),
    )

  def update(self, name: str) -> Program:
    """An update."""
    bundles = self._bundles(self._config.data.prompts_per_step)
    state, frozen = self._state, self._frozen
    return Program(
      name=name,
      function=self._policy.make_update(),
      args=(state, bundles, *(() if frozen is None else (frozen,))),
      kwargs={},
      parts={
        "params": (state.params, frozen),
        "optimizer": state.opt_state,
        "batch": bundles,
      },
      tokens=math.prod(bundles.completion_ids.shape),
    )

  @property
  def _completions(self) -> int:
    config = self._config
    if config.data.kind == "online":
      return config.rollout.num_generations
    if config.data.kind == "preference":
      return config.data.preference_completions
    return 1

  def _array(self, dtype: Any, *shape: int, rows: int) -> Any:
    """Of so many prompts, shared out over the data shards."""
    shape = (rows, *shape)
    place = sharding.batch_sharding(self._mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

  def _prompts(self, rows: int, *, pixels: bool = False) -> tuple:
    """Ids, lengths and images: as a frozen tower reads them, or pixels."""
    vision = self._config.model_config.vision
    image, dtype = (0, 1, 1, 3), jnp.dtype(jnp.uint8)
    if vision and self._with_images:
      side = vision.shown_size
      image, dtype = (1, side, side, 3), jnp.dtype(jnp.uint8)
      if not pixels:
        image = (1, vision.soft_tokens, vision.width)
        dtype = self._policy.model.dtype
    ids = self._array(
      jnp.int32, self._config.data.prompt_buckets[-1], rows=rows
    )
    length = self._array(jnp.int32, rows=rows)
    return ids, length, self._array(dtype, *image, rows=rows)

  def _bundles(self, prompts: int) -> TrainBatch:
    config, kind = self._config, self._config.data.kind
    width, new = self._completions, config.rollout.max_new_tokens
    ids, length, images = self._prompts(
      prompts, pixels=config.model.train_vision
    )

    def array(dtype: Any, *shape: int) -> Any:
      return self._array(dtype, *shape, rows=prompts)

    logps = array(jnp.float32, width, new)
    is_old = kind == "preference" or config.train.num_iterations > 1
    share = config.shaping.top_entropy_share
    is_narrowed = share < 1 and kind != "demonstrations"
    return TrainBatch(
      prompt_ids=ids,
      prompt_length=length,
      images=images,
      completion_ids=array(jnp.int32, width, new),
      completion_mask=array(jnp.bool_, width, new),
      advantages=array(jnp.float32, width),
      old_per_token_logps=logps if is_old else None,
      ref_per_token_logps=logps if config.has_reference else None,
      sampler_logps=logps if kind == "online" else None,
      token_weights=logps if is_narrowed else None,
      preferred=array(jnp.bool_, width, width)
      if kind == "preference"
      else None,
    )
