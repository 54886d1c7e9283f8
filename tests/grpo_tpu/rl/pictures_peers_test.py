"""Prompts of several pictures, from the data to scores, as in transformers."""

import dataclasses
import io
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines import pipeline, prompt_rows, records
from data_pipelines.text import chat_prompts
from data_pipelines.text import tokenizer as tokens
from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.models.gemma3 import weights
from grpo_tpu.models.gemma3.convert import huggingface
from grpo_tpu.models.network import ForwardConfig
from grpo_tpu.rl import pictures, score
from grpo_tpu.rl.train_batch import TrainBatch
from tests.grpo_tpu import conftest

pytestmark = pytest.mark.peers
SCRIPT = pathlib.Path(__file__).parents[2] / "peers" / "gemma3_transformers.py"


def picture(seed):
  rng = np.random.default_rng(seed)
  file = io.BytesIO()
  pixels = rng.integers(0, 256, (20, 30, 3), np.uint8)
  Image.fromarray(pixels).save(file, "PNG")
  return file.getvalue()


def problem(number, query, num_pictures):
  return records.Problem(
    pid=str(number),
    question=query,
    query=query,
    images=tuple(picture(10 * number + i) for i in range(num_pictures)),
    answer="the left one",
    question_type="free_form",
    answer_type="text",
    solution="Both are noise.",
  )


PROBLEMS = [
  problem(0, "Is <image> to the left of <image> or not?\nSay.", 2),
  problem(1, "Which is to the left?", 2),
  problem(2, "Is there no picture?", 0),
  problem(3, "<image>\nIs this all?", 1),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  tokens.train(map(chat_prompts.chat_text, PROBLEMS), path, vocab_size=480)
  return tokens.Tokenizer(path)


def with_markers(ids, tokenizer, soft_tokens):
  """The ids with <start_of_image> alone, which transformers expands."""
  start, end = tokenizer.start_of_image, tokenizer.end_of_image
  image = [start, *[GEMMA3.image_placeholder] * soft_tokens, end]
  image = [GEMMA3.blank_line, *image, GEMMA3.blank_line]
  kept = []
  while ids:
    is_image = ids[: len(image)] == image
    kept.append(start if is_image else ids[0])
    ids = ids[len(image) if is_image else 1 :]
  assert GEMMA3.image_placeholder not in kept
  return kept


def test_scores_equal_those_of_transformers(
  tiny, tokenizer, peers_python, tmp_path
):
  """Pictures in the middle of a text and first; rows of two, one and none."""
  vision = dataclasses.replace(
    tiny.config.vision,
    start_of_image=tokenizer.start_of_image,
    end_of_image=tokenizer.end_of_image,
    image_token=tokenizer.vocab_size,
  )
  config = dataclasses.replace(
    tiny.config, vocab_size=tokenizer.vocab_size, vision=vision
  )
  params = weights.random_params(config, 0, jnp.float32)
  rng = np.random.default_rng(0)  # Norms and projector too.
  params = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0.05, 0.2, x.shape), x.dtype), params
  )
  huggingface.save(config, params, tmp_path / "model")
  builder = prompt_rows.RowBuilder(
    source=PROBLEMS,
    tokenizer=tokenizer,
    kind="demonstrations",
    seed=0,
    prompt_buckets=(128,),
    max_new_tokens=32,
    image_size=vision.shown_size,
    soft_tokens=vision.soft_tokens,
    shards=(0,),
    shard_count=1,
  )
  (batch,) = pipeline.EvalBatches(builder, num_problems=4, batch_size=4)
  assert batch.valid.all() and batch.images.shape[1] == 2
  bundles = TrainBatch(
    *(batch.prompt_ids, batch.prompt_length, batch.images),
    *(batch.completion_ids, batch.completion_mask),
  )
  forward = ForwardConfig(
    config=config,
    dtype=jnp.dtype(jnp.float32),
    remat="none",
    temperature=1.0,
    chunk_size=64,
    train_vision=True,
  )
  packed = pictures.with_num_encoded(bundles, conftest.mesh_of())
  assert packed.num_encoded == 6
  found, _ = score.score_batch(forward, params, packed, num_microbatches=2)

  rows, starts = [], []
  for ids, length, completion, mask in zip(
    batch.prompt_ids,
    batch.prompt_length,
    batch.completion_ids[:, 0],
    batch.completion_mask[:, 0],
    strict=True,
  ):
    prompt = with_markers(ids[:length].tolist(), tokenizer, vision.soft_tokens)
    starts.append(len(prompt))
    rows.append([*prompt, *completion[mask].tolist()])
  given = np.zeros((4, max(map(len, rows))), np.int32)
  for out, row in zip(given, rows, strict=True):
    out[: len(row)] = row
  np.savez(
    tmp_path / "inputs.npz",
    tokens=given,
    images=batch.images,
    num_images=[len(x.images) for x in PROBLEMS],
  )
  subprocess.run(
    [peers_python, str(SCRIPT), "answer", str(tmp_path), "model"], check=True
  )
  logits = np.load(tmp_path / "model.npz")["logits"]
  # The export has a row of the embedding for the placeholder too.
  theirs = np.asarray(jax.nn.log_softmax(logits[..., : config.vocab_size]))
  for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
    expected = [theirs[number, i - 1, row[i]] for i in range(start, len(row))]
    np.testing.assert_allclose(
      found[number, 0, : len(expected)], expected, atol=1e-4
    )
  assert np.std(theirs) > 0.5
