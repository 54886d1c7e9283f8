"""Rebuilds Gemma's SentencePiece model from other formats of its vocabulary.

The model gets the pieces, the order of merges and the type of each piece, which
is all that encoding reads.

References:
  GGUF: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
  tokenizer.json: https://huggingface.co/docs/tokenizers
"""

import contextlib
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from google.protobuf import message

from data_pipelines.text import gguf_header, untrusted
from data_pipelines.text.chat_format import GEMMA3

# Generated at run time, so type checkers cannot see its contents.
_FORMAT: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
# SentencePiece's types of pieces; GGUF uses the same numbers. `NORMAL` ones are
# made by merges, `USER_DEFINED` ones are found before any merge.
NORMAL, _UNKNOWN, _CONTROL, USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_SPACE = "\u2581"
_BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")
# transformers adds this token after the vocabulary.
_SOFT_TOKEN = "<image_soft_token>"


class Piece(NamedTuple):
  """A piece, its rank among merges (the highest merges first), and its type."""

  text: str
  score: float
  kind: int


def from_gguf(path: str | os.PathLike[str]) -> bytes:
  """Rebuilds the SentencePiece model from the metadata of a GGUF file."""
  with _refuse_damage(path, "a GGUF file with a vocabulary"):
    metadata = gguf_header.read(path, "it").metadata
    prefix = "tokenizer.ggml."
    model = untrusted.get_field(metadata, f"{prefix}model", str, "it")
    if model != "llama":
      raise ValueError(
        f"its tokenizer.ggml.model is {untrusted.shorten(model)}, and must be "
        "'llama' as in every Gemma 3."
      )
    columns = []
    for name, kind in (("tokens", str), ("scores", float), ("token_type", int)):
      column = untrusted.get_field(metadata, prefix + name, list, "it")
      untrusted.check_items(column, kind, f"its {prefix}{name}")
      columns.append(column)
    if len({len(column) for column in columns}) > 1:
      raise ValueError(
        f"it has {len(columns[0])} tokens, {len(columns[1])} scores and "
        f"{len(columns[2])} types, which must be as many."
      )
    pieces = []
    for text, score, kind in zip(*columns, strict=True):
      # GGUF calls <start_of_turn> a control; encoding would split a control
      # into ordinary pieces.
      if kind in (_CONTROL, USER_DEFINED):
        text, kind = text.replace(" ", _SPACE), USER_DEFINED
      pieces.append(Piece(text, score, kind))
    return _serialize(pieces)


def from_tokenizer_json(content: bytes, name: str) -> bytes:
  """Rebuilds the model from a tokenizer.json of byte-pair merges."""
  with _refuse_damage(name, "a tokenizer.json of byte-pair merges"):
    tokenizer = untrusted.parse_json(content, "it")
    model = untrusted.get_field(tokenizer, "model", dict, "it")
    kind = model.get("type")
    if kind != "BPE" or not model.get("byte_fallback"):
      raise ValueError(
        f"its model is of type {untrusted.shorten(kind)}, and must be 'BPE' "
        "with byte_fallback as in every Gemma 3."
      )
    rows = untrusted.get_field(tokenizer, "added_tokens", list, "it")
    untrusted.check_items(rows, dict, "its added_tokens")
    added: dict[str, int] = {}
    for row in rows:
      text = untrusted.get_field(row, "content", str, "an added token")
      added[text] = untrusted.get_field(row, "id", int, "an added token")
    ids = untrusted.get_field(model, "vocab", dict, "its model") | added
    untrusted.check_items(ids.values(), int, "its ids")
    merges = untrusted.get_field(model, "merges", list, "its model")
    ids.pop(_SOFT_TOKEN, None)
    texts = sorted(ids, key=ids.__getitem__)
    if [ids[text] for text in texts] != list(range(len(texts))):
      raise ValueError(
        f"it must give its {len(texts)} pieces the ids from 0 on, each once."
      )
    # SentencePiece merges pairs in the order of their results.
    rank: dict[str, int] = {}
    for merge in merges:
      rank.setdefault(_merge_pair(merge), len(rank))

    def piece(text: str) -> Piece:
      if text in added:
        return Piece(text.replace(" ", _SPACE), 0.0, USER_DEFINED)
      if _BYTE_NAME.fullmatch(text):
        return Piece(text, 0.0, _BYTE)
      return Piece(text, -float(rank.get(text, len(rank))), NORMAL)

    return _serialize([piece(text) for text in texts])


@contextlib.contextmanager
def _refuse_damage(path: object, kind: str) -> Iterator[None]:
  """Says what a file must be if the body cannot read it."""
  try:
    yield
  except (OSError, ValueError) as error:
    reason = str(error).removesuffix(".")
    raise ValueError(
      f"tokenizer file {path} must be {kind}, but cannot be read: {reason}. "
      "Give that of a Gemma 3."
    ) from error


def _merge_pair(merge: Any) -> str:
  """The result of a merge; older files write its halves as one string."""
  halves = merge.split(" ") if isinstance(merge, str) else merge
  untrusted.check_kind(halves, list, "each of its merges")
  untrusted.check_items(halves, str, "a merge")
  if len(halves) != 2:
    shown = untrusted.shorten(merge)
    raise ValueError(f"each of its merges must have two halves, not {shown}.")
  return "".join(halves)


def check_pieces(model: bytes) -> None:
  """Checks the pieces of a SentencePiece model.

  Its library ends the process where a piece is empty or holds a zero byte, and
  cannot decode one that is no text.
  """
  try:
    pieces = _FORMAT.ModelProto.FromString(model).pieces
  except message.DecodeError as error:
    raise ValueError(str(error)) from error
  for number, piece in enumerate(pieces):
    text = piece.piece
    if not isinstance(text, str) or not text or "\0" in text:
      raise ValueError(f"piece {number} is {untrusted.shorten(text)}")


def read_pieces(model: bytes) -> list[Piece]:
  """The pieces of a SentencePiece model that has been checked, by id."""
  proto = _FORMAT.ModelProto.FromString(model)
  return [Piece(x.piece, x.score, x.type) for x in proto.pieces]


def _serialize(pieces: Sequence[Piece]) -> bytes:
  """A SentencePiece model file with these pieces."""
  proto = _FORMAT.ModelProto()
  for number, (text, score, kind) in enumerate(pieces):
    if number in (GEMMA3.pad, GEMMA3.eos, GEMMA3.bos):
      kind = _CONTROL
    elif number == GEMMA3.unk:
      kind = _UNKNOWN
    try:
      proto.pieces.add(piece=text, score=score, type=kind)
    except ValueError as error:
      raise ValueError(
        f"piece {number} must be text of one of SentencePiece's types, but "
        f"is {untrusted.shorten(text)} of type {kind}: {error}."
      ) from error
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
