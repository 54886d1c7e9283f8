"""Judges against separate sequences, and completions that they cannot read."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from data_pipelines import images, pipeline, records
from data_pipelines.sources.drawn import synthetic
from data_pipelines.text import chat_prompts
from data_pipelines.text import tokenizer as tokens
from grpo_tpu.checkpoint import load
from grpo_tpu.checkpoint.frozen import Frozen
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import embedding, text
from grpo_tpu.rewards import judge, judge_templates, networks

MODEL = dataclasses.replace(
  Config.from_config_dict(base.get_config()).model,
  weights="random:0",
  compute_dtype="float32",
)
TEMPLATE = judge_templates.Template(
  "{question} It is {answer}.\n<said>\n", "\n</said>\nyes or no?"
)
OPTIONS = {
  "longest_prompt": 64,
  "longest_completion": 8,
  "bundles_at_a_time": 8,
  "pan_and_scan": images.WHOLE,
}
SPEC = synthetic.Spec(
  num_problems=15,
  seed=0,
  difficulty=1,
  kinds=("bar_max", "color"),
  image_size=48,
  multi_choice_share=0.0,
  min_options=3,
  max_options=4,
)
TEXTS = [f"<answer>{word}</answer>" for word in ("red", "blue", "7")]


@pytest.fixture(scope="module")
def problems():
  """Fifteen with a picture and one without."""
  alone = dataclasses.replace(
    records.make_question("What is 3 + 4?"), answer="7"
  )
  return [*synthetic.problems(SPEC), alone]


@pytest.fixture(scope="module")
def tokenizer(problems, tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  words = [chat_prompts.chat_text(x) for x in problems]
  tokens.train(words + ["yes or no? said"] * 99, path, 600)
  return tokens.Tokenizer(path)


def mesh_of(fsdp):
  return sharding.make_mesh(
    replica=1, fsdp=fsdp, tensor=1, devices=jax.devices()[:fsdp]
  )


def scores(tokenizer, problems, texts, *, fsdp=1, valid=None, bundles=8):
  """The values of a judge whose weights are random, as rows of numbers."""
  mesh = mesh_of(fsdp)
  network = Frozen(
    load.load_params(MODEL, mesh),
    mesh,
    dtype="float32",
    memory="device",
    setting="",
  )
  asks = judge.Judge(
    *("judge_1", network, MODEL, TEMPLATE, tokenizer, mesh),
    **OPTIONS | {"bundles_at_a_time": bundles},
  )
  count = len(problems)
  prompts = pipeline.Batch(
    *[np.zeros(count, np.int32)] * 4,
    valid=np.array([True] * count if valid is None else valid),
    problems=tuple(problems),
    completion_ids=None,
    completion_mask=None,
    labels=None,
  )
  with jax.set_mesh(mesh):
    wait = asks.start(prompts, networks.Completed(None, None, texts))
    return wait()["judge_1"]


@functools.partial(jax.jit, static_argnames="config")
def last_logits(config, params, ids, length, pixels):
  states, _, _ = text.prompt_states(
    config, params, ids, length, pixels, dtype=jnp.float32
  )
  last = states[jnp.arange(len(ids)), length - 1]
  return last @ embedding.output_embedding(params).T


def twin(tokenizer, problems, texts):
  """Each whole dialogue as a sequence, and the softmax of all of its ids."""
  vision = MODEL.network.vision
  sequences, shown = [], []
  for problem, said in itertools.product(problems, texts):
    said = (
      f"{records.plain_query(problem)} It is {problem.answer}.\n<said>\n{said}"
    )
    sequences.append(
      chat_prompts.encode_prompt(
        records.make_question(f"{said}\n</said>\nyes or no?", problem.images),
        tokenizer,
        soft_tokens=vision.soft_tokens,
        template=chat_prompts.TEMPLATES["plain"],
      )
    )
    side = vision.shown_size
    own = [images.resize(images.decode(x), side) for x in problem.images]
    shown.append(own or np.zeros((1, side, side, 3), np.uint8))
  length = np.array([*map(len, sequences)], np.int32)
  ids = np.zeros((len(length), max(length)), np.int32)
  for row, sequence in zip(ids, sequences, strict=True):
    row[: len(sequence)] = sequence
  params = load.load_params(MODEL, mesh_of(1))
  logits = last_logits(MODEL.network, params, ids, length, np.array(shown))
  p = np.asarray(jax.nn.softmax(logits), np.float64)[:, :600]
  pieces = [tokenizer.decode([x]).strip() for x in range(tokenizer.vocab_size)]
  yes, no = (
    p[:, [x in (word, word.title(), word.upper()) for x in pieces]].sum(axis=1)
    for word in ("yes", "no")
  )
  return (yes / (yes + no)).reshape(len(problems), -1)


def test_the_share_of_yes_is_that_of_separate_sequences(tokenizer, problems):
  rows = [problems[i] for i in (0, 1, 15)]
  found = scores(tokenizer, rows, [TEXTS] * 3)
  np.testing.assert_allclose(found, twin(tokenizer, rows, TEXTS), rtol=2e-6)
  assert found.dtype == np.float32 and len(np.unique(found)) == 9


def test_company_parts_and_devices_change_no_score(tokenizer, problems):
  """Also another length of the prompts and of the completions."""
  whole = scores(tokenizer, problems, [TEXTS] * 16, bundles=16)
  parts = scores(tokenizer, problems, [TEXTS] * 16, fsdp=4, bundles=7)
  np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-7)
  alone = scores(tokenizer, problems[3:4], [[TEXTS[2]]])
  np.testing.assert_allclose(alone, whole[3:4, 2:], rtol=1e-6, atol=1e-7)


def test_what_cannot_be_judged_has_no_score_and_what_says_nothing_has_0(
  tokenizer, problems
):
  long = dataclasses.replace(problems[15], question="three and " * 400)
  unknown = dataclasses.replace(problems[15], answer="")
  rows = [problems[0], long, unknown, problems[1]]
  texts = [["red", "red " * 99], ["7", "7"], ["7", " "], ["red", ""]]
  found = scores(tokenizer, rows, texts, valid=[True, True, True, False])
  assert np.isnan(found).tolist() == [
    [False, True],
    [True, True],
    [True, False],
    [False, False],
  ]
  assert found[2:][~np.isnan(found[2:])].tolist() == [0, 0, 0]
  alone = scores(tokenizer, [problems[0]], [["red", "blue"]])
  np.testing.assert_allclose(found[0, 0], alone[0, 0], rtol=1e-6)


class Spelling:
  """A tokenizer of which only the spelling of words matters."""

  def __init__(self, **pieces):
    self.pieces = pieces

  def encode(self, text):
    return self.pieces.get(text.replace(" ", "_"), [0, 1])


def test_single_tokens_of_an_answer_add_up_and_others_give_a_first_piece():
  spelled = Spelling(yes=[5], Yes=[6], _no=[9, 1], NO=[8, 2])
  # The id 0 begins spellings of no that are not listed.
  assert judge.answer_ids(spelled) == ((5, 6), (0, 8, 9))
  both = Spelling(_yes=[3, 5], _no=[3, 6], yes=[7, 1], no=[8, 1])
  assert judge.answer_ids(both) == ((7,), (8,))
  with pytest.raises(ValueError, match="pieces that differ"):
    judge.answer_ids(Spelling(yes=[3, 4], no=[3, 5]))


def test_lengths_are_few_and_close():
  assert judge.lengths(100) == (32, 48, 64, 96, 128)
  assert len(judge.lengths(32_000)) == 21
