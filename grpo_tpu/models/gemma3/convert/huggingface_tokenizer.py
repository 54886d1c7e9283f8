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

_FILE = "huggingface_tokenizer.toml"


def chat_template() -> bytes:
  """A jinja template of the turns that `chat_prompts.encode_prompt` encodes."""
  folder = pathlib.Path(__file__).with_name("templates")
  return (folder / "chat_template.j2").read_bytes()


def tokenizer_files(
  source: tokenizer.Tokenizer, config: gemma3_config.ModelConfig
) -> dict[str, Any]:
  """The files of a tokenizer by name: their bytes, or values for JSON."""
  fixed = tables.read(__package__, _FILE)
  pieces = sentencepiece_import.read_pieces(source.model)
  vocab = {piece.text: number for number, piece in enumerate(pieces)}
  added = [
    _added_token(number, piece.text, is_special=number in source.controls)
    for number, piece in enumerate(pieces)
    if number in source.controls or piece.is_symbol
  ]
  values = fixed["tokenizer_config"]
  if config.vision:
    names, number = fixed["image_tokens"], config.vision.image_token
    values = values | names | fixed["processor_config"]
    values["extra_special_tokens"] = names
    vocab[names["image_token"]] = number
    added.append(_added_token(number, names["image_token"], is_special=True))
    # vLLM wants pieces for the newlines between two images, which a small
    # vocabulary lacks. No merge makes these two, so no text has their ids.
    for count in (3, 4):
      vocab.setdefault("\n" * count, number + count - 2)
  merges = {"vocab": vocab, "merges": list(_merges(pieces))}
  content = fixed["tokenizer"] | {
    "added_tokens": added,
    "model": fixed["tokenizer"]["model"] | merges,
  }
  return {
    "tokenizer.model": source.model,
    "tokenizer.json": json.dumps(content, ensure_ascii=False).encode(),
    "tokenizer_config.json": values,
  }


def processor_files(config: gemma3_config.ModelConfig) -> dict[str, Any]:
  """The files of the image processor by name; none for a text model."""
  tower = config.vision
  if tower is None:
    return {}
  fixed = tables.read(__package__, _FILE)
  length = {"image_seq_length": tower.soft_tokens}
  size = {"size": {"height": tower.image_size, "width": tower.image_size}}
  return {
    "preprocessor_config.json": fixed["preprocessor_config"] | length | size,
    "processor_config.json": fixed["processor_config"] | length,
  }


def _added_token(number: int, text: str, *, is_special: bool) -> dict[str, Any]:
  """A token that is found in a text before any merge."""
  return {
    "id": number,
    "content": text,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": not is_special,
    "special": is_special,
  }


def _merges(
  pieces: Sequence[sentencepiece_import.Piece],
) -> Iterator[tuple[str, str]]:
  """Pairs of pieces that make a piece, the best piece first."""
  normal = [piece for piece in pieces if piece.is_normal]
  known = {piece.text for piece in normal}
  for piece in sorted(normal, key=lambda piece: -piece.score):
    for cut in range(1, len(piece.text)):
      pair = piece.text[:cut], piece.text[cut:]
      if known.issuperset(pair):
        yield pair
