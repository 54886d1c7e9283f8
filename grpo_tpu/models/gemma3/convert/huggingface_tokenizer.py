"""The tokenizer, chat template and image processor in transformers' files.

The ids of a text are those of our tokenizer, unless the text spells the name of
a control token, which ours encodes in ordinary pieces.

References:
  tokenizer.json: https://huggingface.co/docs/tokenizers
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipelines.text import sentencepiece_import, tables, tokenizer
from grpo_tpu.models.gemma3 import config as gemma3_config

_FIXED = tables.read(__package__, "huggingface_tokenizer.toml")
_IMAGE_TOKEN = "<image_soft_token>"
# Transformers and vLLM join the newlines before an image with others to pieces
# of up to four, as in Gemma's vocabulary. A small one keeps them apart, as in
# training: its newlines go by another name, and the pieces that vLLM looks for
# have ids that no text gives.
_NEWLINE, _MOST_NEWLINES = "\ue00a", "\n\n\n\n"


def chat_template() -> bytes:
  """A jinja template of the turns that `chat_prompts.encode_prompt` encodes."""
  folder = pathlib.Path(__file__).with_name("templates")
  return (folder / "chat_template.j2").read_bytes()


def tokenizer_files(
  source: tokenizer.Tokenizer, config: gemma3_config.ModelConfig
) -> dict[str, Any]:
  """The files of a tokenizer by name: their bytes, or values for JSON."""
  pieces = sentencepiece_import.read_pieces(source.model)
  vocab = {piece.text: number for number, piece in enumerate(pieces)}
  content, merges = _FIXED["tokenizer"], list(_merges(pieces))
  found = {
    x.text for x in pieces if x.kind == sentencepiece_import.USER_DEFINED
  }
  settings = _FIXED["tokenizer_config"]
  if config.vision:
    images = _FIXED["image_tokens"]
    settings = settings | images | _FIXED["processor_config"]
    settings["extra_special_tokens"] = images
    number = config.vision.image_token
    vocab[_IMAGE_TOKEN] = number
    if _MOST_NEWLINES not in vocab:
      content = content | _FIXED["few_newlines"]
      found -= {"\n", "\n\n"}
      vocab |= {_NEWLINE: vocab["\n"], _NEWLINE * 2: vocab["\n\n"]}
      merges.append((_NEWLINE, _NEWLINE))
      vocab |= {"\n" * i: number + i for i in range(1, len(_MOST_NEWLINES) + 1)}
  special = source.controls | {vocab.get(_IMAGE_TOKEN)}
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
  # Tokens that are found in a text before any merge.
  added = [
    {"id": number, "content": text, "special": number in special}
    | {"normalized": number not in special, **flags}
    for text, number in vocab.items()
    if text in found or number in special
  ]
  model = content["model"] | {"vocab": vocab, "merges": merges}
  content = content | {"added_tokens": added, "model": model}
  return {
    "tokenizer.model": source.model,
    "tokenizer.json": json.dumps(content, ensure_ascii=False).encode(),
    "tokenizer_config.json": settings,
  }


def processor_files(config: gemma3_config.ModelConfig) -> dict[str, Any]:
  """The files of the image processor by name; none for a text model."""
  tower = config.vision
  if tower is None:
    return {}
  length = {"image_seq_length": tower.soft_tokens}
  size = {"size": {"height": tower.image_size, "width": tower.image_size}}
  return {
    "preprocessor_config.json": _FIXED["preprocessor_config"] | length | size,
    "processor_config.json": _FIXED["processor_config"] | length,
  }


def _merges(
  pieces: Sequence[sentencepiece_import.Piece],
) -> Iterator[tuple[str, str]]:
  """Pairs of pieces that make a piece, the best piece first."""
  normal = [x for x in pieces if x.kind == sentencepiece_import.NORMAL]
  known = {piece.text for piece in normal}
  for piece in sorted(normal, key=lambda piece: -piece.score):
    for cut in range(1, len(piece.text)):
      pair = piece.text[:cut], piece.text[cut:]
      if known.issuperset(pair):
        yield pair
