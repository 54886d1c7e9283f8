"""Judges: frozen networks that are asked whether a completion is right.

The reward is p(yes) / (p(yes) + p(no)), read where the answer would begin, in
one pass over bundles: a prompt with its pictures is read once, with all of its
completions beside it, and nothing is sampled.
"""

import bisect
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from data_pipelines import images, pipeline, prompt_rows, records
from data_pipelines.text import chat_prompts
from data_pipelines.text import tokenizer as tokens
from data_pipelines.validation import SettingError, printable
from grpo_tpu.checkpoint import networks as files
from grpo_tpu.checkpoint.frozen import Frozen
from grpo_tpu.distributed import sharding
from grpo_tpu.models import logprobs
from grpo_tpu.models.gemma3 import embedding, text
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.models.settings import ModelSettings
from grpo_tpu.rewards import judge_templates, networks
from grpo_tpu.rewards.model import BundleScorer, load_frozen, network_forward
from grpo_tpu.rewards.settings import RewardConfig

# Tokens that a reference answer may add to the longest prompt of the policy.
ANSWER_TOKENS = 256


class Judge(BundleScorer):
  """A frozen network with the question that it is asked."""

  def __init__(
    self,
    name: str,
    network: Frozen,
    model: ModelSettings,
    template: judge_templates.Template,
    tokenizer: tokens.Tokenizer,
    mesh: Mesh,
    *,
    longest_prompt: int,
    longest_completion: int,
    bundles_at_a_time: int,
    pan_and_scan: images.PanAndScan,
  ):
    """Compiles nothing yet; `model` says how the network runs.

    The policy's prompts and completions have at most so many tokens. Of its
    prompts, over all hosts, `bundles_at_a_time` are read at a time.
    """
    score = functools.partial(
      share_of_yes, network_forward(model, mesh), words=answer_ids(tokenizer)
    )
    super().__init__(score, network, mesh, bundles_at_a_time)
    self.names, self._tokenizer, self._template = (name,), tokenizer, template
    chat, fixed = tokenizer.chat, len(tokenizer.encode(template.before))
    self._turn = [chat.end_of_turn, chat.newline, chat.start_of_turn]
    self._turn += tokenizer.encode(chat.model)
    self._ending = [*tokenizer.encode(template.after), *self._turn]
    self._lengths = lengths(longest_completion + len(self._ending))
    vision = model.network.vision
    self._builder = prompt_rows.RowBuilder(
      source=(),
      tokenizer=tokenizer,
      prompt_buckets=lengths(longest_prompt + fixed + ANSWER_TOKENS),
      image_size=vision.shown_size if vision else 0,
      soft_tokens=vision.soft_tokens if vision else 0,
      template=chat_prompts.TEMPLATES["plain"],
      pan_and_scan=pan_and_scan,
    )

  def start(
    self, prompts: pipeline.Batch, completed: networks.Completed
  ) -> Callable[[], networks.Values]:
    """Starts the devices on all completions; see `networks.NetworkReward`.

    A completion in which nothing is visible scores 0. One has no score if its
    prompt or itself is too long, or if the template needs an answer and none is
    known.
    """
    asked = self._ask(prompts)
    texts = [list(map(self._template.visible, x)) for x in completed.texts]
    is_judged = np.array([[x != "" for x in group] for group in texts])
    is_judged &= prompts.valid[:, None]
    ids = [self._tokenizer.encode(x) + self._ending for x in sum(texts, [])]
    length = np.array([*map(len, ids)], np.int32).reshape(is_judged.shape)
    fits = asked.valid[:, None] & (length <= self._lengths[-1])
    for row in np.flatnonzero((is_judged & ~fits).any(axis=1)):
      message = (
        "%s cannot judge completions of problem %s: they or its prompt are too "
        "long, or the template has {answer}, which is not known."
      )
      pid = printable(prompts.problems[row].pid)
      logging.log_first_n(logging.WARNING, message, 3, self.names[0], pid)
    length = np.where(fits, length, 0)
    # All processes run the same program.
    own = [asked.prompt_ids.shape[1], asked.images.shape[1], length.max()]
    every = multihost_utils.process_allgather(np.array(own))
    num_tokens, num_images, longest = np.reshape(every, (-1, 3)).max(axis=0)
    longest = next(x for x in self._lengths if x >= longest)
    ids = np.array([(x + [0] * longest)[:longest] for x in ids], np.int32)
    rows = (
      *(_widen(asked.prompt_ids, num_tokens), asked.prompt_length),
      *(_widen(asked.images, num_images), ids.reshape(*length.shape, longest)),
      length,
    )
    rows = sharding.device_put_batch(self._mesh, rows)
    wait = self._start(self._network.params, *rows)

    def values() -> networks.Values:
      found = np.where(fits, wait(), np.float32(np.nan))
      return {self.names[0]: np.where(is_judged, found, np.float32(0))}

    return values

  def _ask(self, prompts: pipeline.Batch) -> pipeline.Batch:
    """The prompts up to the response; those that cannot be made are invalid."""
    can_ask = prompts.valid.copy()
    if self._template.needs_answer:
      can_ask &= [x.answer != "" for x in prompts.problems]
    asked = [records.make_question("")] * len(can_ask)
    for row in np.flatnonzero(can_ask):
      problem = prompts.problems[row]
      text = self._template.prompt(problem)
      asked[row] = records.make_question(text, problem.images)
    count = len(asked)
    builder = dataclasses.replace(self._builder, source=asked)
    batch = pipeline.EvalBatches(builder, num_problems=count, batch_size=count)[
      0
    ]
    # The response follows, and the turn ends after it.
    ids, length = batch.prompt_ids, batch.prompt_length - len(self._turn)
    ids = np.where(np.arange(ids.shape[1]) < length[:, None], ids, 0)
    return dataclasses.replace(
      batch, prompt_ids=ids, prompt_length=length, valid=batch.valid & can_ask
    )


def open_judges(
  config: RewardConfig,
  policy: ModelSettings,
  start: Frozen | None,
  *rest: Any,
  **options: Any,
) -> list[Judge]:
  """Loads the judges of a run, each network once.

  `start` is what the policy started from, for "self"; `rest` and `options` are
  the last arguments of `Judge`.
  """
  opened: dict[str, Any] = {"self": (start, policy)}
  judges = []
  for number, (weights, template, _) in enumerate(config.judges, start=1):
    if weights not in opened:
      model = files.read_settings(weights, policy, setting="rewards.judges")
      opened[weights] = load_frozen(model, config, rest[-1]), model
    question = judge_templates.open_template(template)
    network, model = opened[weights]
    named = f"judge_{number}", network, model
    judges.append(Judge(*named, question, *rest, **options))
  return judges


def share_of_yes(
  forward: ForwardConfig,
  params: dict,
  prompt_ids: Int[Array, "U P"],
  prompt_length: Int[Array, " U"],
  images: text.Images,
  ids: Int[Array, "U C T"],
  length: Int[Array, "U C"],
  *,
  words: tuple[tuple[int, ...], tuple[int, ...]],
) -> Float[Array, "U C"]:
  """p(yes) / (p(yes) + p(no)) after each of `C` continuations, in fp32.

  `words` holds the ids of yes and those of no; ids of one answer add up.
  """
  states = text.bundle_states(
    *(forward.config, params, prompt_ids, prompt_length, images, ids),
    dtype=forward.dtype,
    remat="none",
    implementation=forward.attention,
    completion_length=length,
  )[:, :, 0]
  # The sum over the vocabulary cancels.
  table = embedding.output_embedding(params)
  yes, no = (
    logprobs.output_logits(states, table[np.array(each)], temperature=1.0)
    for each in words
  )
  yes, no = (jax.nn.logsumexp(x, axis=-1) for x in (yes, no))
  return jax.nn.sigmoid(yes - no)


def answer_ids(
  tokenizer: tokens.Tokenizer,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The ids of yes and of no, with a capital, in capitals, after a space.

  Those of a word without a token of its own are the first pieces of its
  spellings.

  Raises:
    SettingError: Both words begin with the same pieces.
  """

  def ids(word: str) -> set[int]:
    forms = (word, word.capitalize(), word.upper())
    spelled = [tokenizer.encode(s + x) for s in ("", " ") for x in forms]
    return {x[0] for x in spelled if len(x) == 1} or {x[0] for x in spelled}

  yes, no = ids("yes"), ids("no")
  if not (yes - no and no - yes):
    raise SettingError(
      "rewards.judges need a tokenizer in which yes and no begin with pieces "
      "that differ; name another in data.tokenizer."
    )
  return tuple(sorted(yes - no)), tuple(sorted(no - yes))


def lengths(longest: int) -> tuple[int, ...]:
  """Ascending lengths to pad to; the last holds `longest`."""
  # Powers of two, and the numbers halfway.
  sizes = [count << bit for bit in range(4, 24) for count in (2, 3)]
  return tuple(sizes[: bisect.bisect_left(sizes, longest) + 1])


def _widen(rows: np.ndarray, size: int) -> np.ndarray:
  """The rows with zeros after the entries of their second axis."""
  missing = [(0, 0), (0, size - rows.shape[1])]
  return np.pad(rows, missing + [(0, 0)] * (rows.ndim - 2))
