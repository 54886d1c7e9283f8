"""Rebuilds Gemma's SentencePiece model from other formats of its vocabulary.

The model gets the pieces, the order of merges and the type of each piece, which
is all that encoding reads.

References:
  SentencePiece: https://github.com/google/sentencepiece
  GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
  tokenizer.json: https://huggingface.co/docs/tokenizers
"""

import importlib
import json
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from data_pipelines.text.chat_format import GEMMA3

# SentencePiece's types of pieces; GGUF uses the same numbers.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "\u2581"
_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")
# transformers adds this token after the vocabulary.
_SOFT_TOKEN = "<image_soft_token>"


class _Piece(NamedTuple):
  text: str
  score: float
  kind: int


def from_gguf(path: str | os.PathLike[str]) -> bytes:
  """Rebuilds the SentencePiece model from the metadata of a GGUF file.

  Raises:
    ValueError: The `gguf` package is missing, or the file has no such
      vocabulary.
  """
  try:
    import gguf
  except ImportError as error:
    raise ValueError(
      f"tokenizer file {path} must be read with the gguf package, which is not "
      'installed; run pip install "grpo_tpu[export]".'
    ) from error
  try:
    fields = gguf.GGUFReader(os.fspath(path)).fields
    read = {
      name: fields[f"tokenizer.ggml.{name}"].contents()
      for name in ("model", "tokens", "scores", "token_type")
    }
  # The reader may raise any of these for noise or a truncated file.
  except (ValueError, IndexError, KeyError, OverflowError) as error:
    raise ValueError(
      f"tokenizer file {path} must be a GGUF file with a vocabulary, but "
      f"cannot be read: {error!r}; give that of a Gemma 3."
    ) from error
  if read["model"] != "llama":
    raise ValueError(
      f"tokenizer file {path} has tokenizer.ggml.model {read['model']!r}, "
      "which must be 'llama' as in every Gemma 3; give such a file."
    )
  pieces = []
  columns = (read["tokens"], read["scores"], read["token_type"])
  for text, score, kind in zip(*columns, strict=True):
    # GGUF calls <start_of_turn> a control; encoding would split a control into
    # ordinary pieces.
    if kind in (_CONTROL, _USER_DEFINED):
      text, kind = _escape_spaces(text), _USER_DEFINED
    pieces.append(_Piece(text, score, kind))
  return _serialize(pieces)


def from_tokenizer_json(content: bytes, name: str) -> bytes:
  """Rebuilds the SentencePiece model from a Hugging Face tokenizer.json.

  Raises:
    ValueError: The file is no tokenizer.json of byte-pair merges with bytes as
      fallback.
  """
  try:
    tokenizer = json.loads(content)
    model, added = tokenizer["model"], tokenizer["added_tokens"]
    ids = dict(model["vocab"]) | {x["content"]: x["id"] for x in added}
    merges = [_pair(merge) for merge in model["merges"]]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f"tokenizer file {name} must be a tokenizer.json of byte-pair merges, "
      f"but cannot be read: {error!r}; give that of a Gemma 3."
    ) from error
  if model.get("type") != "BPE" or not model.get("byte_fallback"):
    raise ValueError(
      f"tokenizer file {name} has a model of type {model.get('type')!r}, which "
      "must be 'BPE' with byte_fallback as in every Gemma 3; give such a file."
    )
  ids.pop(_SOFT_TOKEN, None)
  texts = sorted(ids, key=ids.__getitem__)
  if [ids[text] for text in texts] != list(range(len(texts))):
    raise ValueError(
      f"tokenizer file {name} must give its {len(texts)} pieces the ids from 0 "
      "on, each once; give that of a Gemma 3."
    )
  # SentencePiece merges pairs in the order of their results.
  rank: dict[str, int] = {}
  for left, right in merges:
    rank.setdefault(left + right, len(rank))
  whole = {x["content"] for x in added}

  def piece(text: str) -> _Piece:
    if text in whole:
      return _Piece(_escape_spaces(text), 0.0, _USER_DEFINED)
    if _BYTE_NAME.fullmatch(text):
      return _Piece(text, 0.0, _BYTE)
    return _Piece(text, -float(rank.get(text, len(rank))), _NORMAL)

  return _serialize([piece(text) for text in texts])


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
  """The two halves of a merge; older files write it as one string."""
  left, right = merge.split(" ") if isinstance(merge, str) else merge
  return left, right


def _escape_spaces(text: str) -> str:
  return text.replace(" ", _SPACE)


def _serialize(pieces: Sequence[_Piece]) -> bytes:
  """A SentencePiece model file with these pieces."""
  # Generated at run time, so type checkers cannot see its contents.
  format = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
  proto = format.ModelProto()
  for number, (text, score, kind) in enumerate(pieces):
    if number in (GEMMA3.pad, GEMMA3.eos, GEMMA3.bos):
      kind = _CONTROL
    elif number == GEMMA3.unk:
      kind = _UNKNOWN
    proto.pieces.add(piece=text, score=score, type=kind)
  names = [piece.text for piece in pieces[: GEMMA3.unk + 1]]
  trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
  trainer.model_type = 2  # BPE.
  trainer.vocab_size = len(pieces)
  trainer.byte_fallback = True
  for key in ("pad", "eos", "bos", "unk"):
    number = getattr(GEMMA3, key)
    setattr(trainer, f"{key}_id", number)
    if number < len(names):
      setattr(trainer, f"{key}_piece", names[number])
  normalizer.name = "identity"
  normalizer.add_dummy_prefix = False
  normalizer.remove_extra_whitespaces = False
  normalizer.escape_whitespaces = True
  return proto.SerializeToString()
