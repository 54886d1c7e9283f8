"""A sampler whose completions are scripted, and the problems for it."""

import dataclasses
import io
import pathlib

import jax
import numpy as np
import PIL.Image
from jax.sharding import AxisType, Mesh

from configs import base
from data_pipelines import pipeline, prompt_rows, records
from data_pipelines.text import chat_prompts
from data_pipelines.text import tokenizer as tokens
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import sharding
from grpo_tpu.evaluation import evaluate
from grpo_tpu.rl.experience import Collector
from grpo_tpu.rollout import engine
from grpo_tpu.rollout.sampler import Sampler, Samples

MAX_NEW_TOKENS = 24
SOFT_TOKENS = 4
IMAGE_SIZE = 8
# Of each problem: its type, its answer, and what the greedy policy writes.
SCRIPT = (
  ("integer", "3", "<answer>3</answer>"),
  ("integer", "4", "<answer>5</answer>"),
  ("float", "1.5", "<answer>1.5</answer>"),
  ("text", "blue", "<answer>blue</answer>"),
  ("text", "blue", "<answer>red</answer>"),
  ("list", "[1, 2]", "<answer>[1, 2]</answer>"),
  ("integer", "7", "6 " * MAX_NEW_TOKENS),  # Cut off: no end of turn.
  ("integer", "8", "<answer>8</answer>"),  # UNREADABLE: is never asked.
  ("float", "2.5", "<answer>2.5</answer>"),  # TOO_LONG: neither is this.
  ("integer", "9", "π <answer>9</answer>"),
  ("text", "red", "<answer>red</answer>"),
)
EVERY = range(len(SCRIPT))
UNREADABLE, TOO_LONG = 7, 8
RIGHT = (0, 2, 3, 5, 9, 10)
ASKED = tuple(i for i in range(len(SCRIPT)) if i not in (UNREADABLE, TOO_LONG))


def make_problem(index):
  answer_type, answer, _ = SCRIPT[index]
  is_choice = answer_type == "text"
  question = "7" * 300 if index == TOO_LONG else "What?"
  file = io.BytesIO()
  PIL.Image.new("RGB", (9, 7), (index * 20, 5, 9)).save(file, "PNG")
  return records.Problem(
    pid=f"p{index}",
    question=question,
    image_path=f"images/{index}.png",
    images=(file.getvalue(),),
    choices=("red", "blue") if is_choice else (),
    unit="",
    precision=1 if answer_type == "float" else -1,
    answer=answer,
    question_type="multi_choice" if is_choice else "free_form",
    answer_type=answer_type,
    query=question,
    solution="",
    metadata={"source": "drawn", "skills": ["arithmetic"]},
  )


PROBLEMS = [make_problem(index) for index in range(len(SCRIPT))]


class Source:
  """The problems, of which one cannot be read."""

  def __init__(self, indices):
    self.indices = list(indices)

  def __len__(self):
    return len(self.indices)

  def __getitem__(self, index, /):
    if self.indices[index] == UNREADABLE:
      raise records.BadRecord("truncated", "the record ends too soon")
    return PROBLEMS[self.indices[index]]


def make_tokenizer(folder: pathlib.Path) -> tokens.Tokenizer:
  path = folder / "tokenizer.model"
  tokens.train(map(chat_prompts.chat_text, PROBLEMS), path, 512)
  return tokens.Tokenizer(path)


class ScriptedSampler(Sampler):
  """Gives `completions[pid][g]`, and "?" for all other problems."""

  def __init__(self, model, settings, mesh, tokenizer, completions=()):
    super().__init__(model, settings, mesh, tokenizer)
    self.completions = dict(completions)

  def sample(self, params, prompts, key, *, num_completions, **_):
    shape = (len(prompts.problems), num_completions)
    ids = np.zeros((*shape, MAX_NEW_TOKENS), np.int32)
    lengths = np.zeros(shape, np.int32)
    stopped = np.zeros(shape, bool)
    for row, column in np.ndindex(*shape):
      pid = prompts.problems[row].pid
      texts = self.completions.get(pid, ["?"] * num_completions)
      tokens = chat_prompts.encode_completion(texts[column], self.tokenizer)
      stopped[row, column] = len(tokens) <= MAX_NEW_TOKENS
      tokens = tokens[:MAX_NEW_TOKENS]
      ids[row, column, : len(tokens)] = tokens
      lengths[row, column] = len(tokens)
    mask = np.arange(MAX_NEW_TOKENS) < lengths[..., None]
    completions = engine.Completions(
      ids, mask, np.where(mask, np.float32(-1), 0), stopped
    )
    completions = sharding.device_put_batch(self.mesh, completions)
    return Samples(completions, None, {})

  def images(self, params, prompts):
    return sharding.device_put_batch(self.mesh, prompts.images)


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run whose completions are known."""

  config: Config
  sampler: ScriptedSampler

  @property
  def collector(self):
    return Collector(self.sampler, self.config.collector_config)

  @property
  def mesh(self):
    return self.sampler.mesh

  @property
  def tokenizer(self):
    return self.sampler.tokenizer

  def collect(self, prompts, key, *, position=0, num_shown=None, **options):
    return self.collector.collect(
      {},
      iter(prompts),
      key,
      position=position,
      num_shown=num_shown,
      **options,
    )

  def evaluate(self, prompts, *, num_samples=0):
    return evaluate.evaluate_set(
      self.sampler, {}, prompts, self.config, num_shown=num_samples
    )


def mesh_of(num_devices):
  devices = np.array(jax.devices()[:num_devices]).reshape(1, num_devices, 1)
  return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def make_run(
  tokenizer,
  completions,
  *,
  num_devices=1,
  kind="online",
  shaping=(),
  rewards=(),
  sampler=ScriptedSampler,
  **objective,
):
  values = base.get_config()
  values.data.kind = kind
  values.model.weights = "random:0"
  values.rollout.num_generations = 4
  values.rollout.max_new_tokens = MAX_NEW_TOKENS
  values.objective.update(objective)
  values.shaping.update(dict(shaping))
  values.rewards.update(dict(rewards))
  config = Config.from_config_dict(values)
  mesh = mesh_of(num_devices)
  return Run(
    config, sampler(config.model, config.rollout, mesh, tokenizer, completions)
  )


def make_builder(source, tokenizer, **changes):
  fields = dict(
    kind="online",
    seed=0,
    prompt_buckets=(96,),
    max_new_tokens=MAX_NEW_TOKENS,
    image_size=IMAGE_SIZE,
    soft_tokens=SOFT_TOKENS,
    shards=(0,),
    shard_count=1,
  )
  return prompt_rows.RowBuilder(
    source=source, tokenizer=tokenizer, **fields | changes
  )


def batches_of(tokenizer, *, batch_size, indices=EVERY):
  builder = make_builder(Source(indices), tokenizer)
  return pipeline.EvalBatches(
    builder, num_problems=len(SCRIPT), batch_size=batch_size
  )


def group_of(index, right):
  """Four replies to a problem; those at `right` are right."""
  wrong = "<answer>1000</answer>" if index not in (3, 4, 10) else "none"
  gold = f"<answer>{SCRIPT[index][1]}</answer>"
  return [gold if column in right else wrong for column in range(4)]


GROUPS = {
  f"p{i}": group_of(i, right)
  for i, right in enumerate(
    [(0,), (1, 2), (), (0, 1, 2, 3), (3,), (0, 2)] + [(0, 1)] * 5
  )
}
