"""The tokenizer that an export writes gives the ids that training gave."""

import dataclasses
import itertools
import json

import jinja2
import numpy as np
import pytest

from data_pipelines import records
from data_pipelines.text import chat_prompts
from data_pipelines.text import tokenizer as tokens
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3.convert import huggingface_tokenizer

CONFIG = gemma3_config.CONFIGS["tiny"]
TEXTS = ["What is 12 + 30?", "Which bar is tallest?", "the theory of the sea"]
# Every character of the chats below, which then need no bytes.
OTHERS = ["user", "model", "Write the final answer as <.../>. Be brief. 4"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  tokens.train((TEXTS + OTHERS) * 3, path, 600)
  return tokens.Tokenizer(path)


def written(tokenizer, config=CONFIG):
  files = huggingface_tokenizer.tokenizer_files(tokenizer, config)
  return files, json.loads(files["tokenizer.json"])


def greedy(content, text):
  """Byte-pair merges as their definition says, without added tokens."""
  rank = {tuple(pair): i for i, pair in enumerate(content["model"]["merges"])}
  pieces = list(text.replace(" ", "\u2581"))
  while True:
    pairs = [rank.get(x, len(rank)) for x in itertools.pairwise(pieces)]
    if not pairs or min(pairs) == len(rank):
      break
    at = int(np.argmin(pairs))
    pieces[at : at + 2] = ["".join(pieces[at : at + 2])]
  return [content["model"]["vocab"][piece] for piece in pieces]


@pytest.mark.parametrize("text", [*TEXTS, "the  bar is 3?", "tallest what"])
def test_the_merges_give_the_ids_of_sentencepiece(tokenizer, text):
  _, content = written(tokenizer)
  assert greedy(content, text) == tokenizer.encode(text)


def test_a_text_models_file_is_read_back_as_the_same_tokenizer(
  tokenizer, tmp_path
):
  files, _ = written(tokenizer, dataclasses.replace(CONFIG, vision=None))
  (tmp_path / "tokenizer.json").write_bytes(files["tokenizer.json"])
  again = tokens.Tokenizer(tmp_path / "tokenizer.json")
  for text in (*TEXTS, "<answer>4</answer>\n\n\n", "\u00df\U0001f600 <eos>"):
    assert again.encode(text) == tokenizer.encode(text)
  assert files["tokenizer.model"] == tokenizer.model


def test_special_tokens_are_those_that_decoding_leaves_out(tokenizer):
  """The image token stands behind the vocabulary, where no text reaches."""
  _, content = written(tokenizer)
  special = {x["id"] for x in content["added_tokens"] if x["special"]}
  assert special == tokenizer.controls | {CONFIG.vision.image_token}
  vocab = content["model"]["vocab"]
  assert len(set(vocab.values())) == len(vocab)
  for name in ("\n\n\n", "\n\n\n\n"):  # For vLLM.
    assert vocab[name] > CONFIG.vision.image_token
    assert name not in {"".join(x) for x in content["model"]["merges"]}


def test_the_image_processor_makes_the_towers_pictures():
  files = huggingface_tokenizer.processor_files(CONFIG)
  images = files["preprocessor_config.json"]
  assert images["size"] == {"height": 48, "width": 48}
  assert files["processor_config.json"]["image_seq_length"] == 9
  text = dataclasses.replace(CONFIG, vision=None)
  assert huggingface_tokenizer.processor_files(text) == {}


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize("images", [(), (b"picture",)])
def test_the_chat_template_writes_the_turns_of_training(
  tokenizer, system, images
):
  """With a solved example, as one turn of each role, and a system text."""
  kinds = {"question_type": "free_form", "answer_type": "integer"}
  example = records.Problem(pid="1", question="2 + 2?", answer="4", **kinds)
  asked = dataclasses.replace(
    example, pid="2", question=" 1 + 1? ", images=images
  )
  template = dataclasses.replace(
    chat_prompts.TAGGED, system=system, few_shot=1, examples=(example,)
  )
  ids = chat_prompts.encode_prompt(
    asked, tokenizer, soft_tokens=0, template=template
  )
  text = chat_prompts.prompt_text(asked, template=template)
  content = [
    *[{"type": "image"} for _ in images],
    {"type": "text", "text": text},
  ]
  ((question, answer),) = chat_prompts.earlier_turns(asked, template)
  messages = [
    *([{"role": "system", "content": system}] if system else []),
    {"role": "user", "content": question},
    {"role": "assistant", "content": answer},
    {"role": "user", "content": content},
  ]
  rendered = (
    jinja2.Template(huggingface_tokenizer.chat_template().decode())
    .render(messages=messages, bos_token="<bos>", add_generation_prompt=True)
    .replace("<start_of_image>", "\n\n<start_of_image><end_of_image>\n\n")
  )
  assert rendered.startswith("<bos>")
  # As text: where three newlines meet before an image, ids may cut them after
  # the first or after the second.
  pieces = [tokenizer._processor.IdToPiece(number) for number in ids]
  assert "".join(pieces) == rendered.replace(" ", "\u2581")
