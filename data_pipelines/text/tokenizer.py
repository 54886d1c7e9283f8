"""Encodes text as token ids and back, with Gemma's special tokens.

Reads Gemma's own SentencePiece file, the small ones that `train` writes, and
two other formats of Gemma's vocabulary.

References:
  SentencePiece: https://arxiv.org/abs/1808.06226
"""

import collections
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
from etils import epath

from data_pipelines.storage.host_copy import host_copy
from data_pipelines.text import sentencepiece_import, tables, untrusted
from data_pipelines.text.chat_format import GEMMA3

# Names the file that the `gemma` library reads, in that library's folder.
GEMMA = "gemma"
_REMEDY = "give Gemma 3's tokenizer.model or one made by data_pipelines.prepare"
_MIN_TEXT_PIECES = 32
_NUM_BYTES = 256
_SPECIAL = ("pad", "eos", "bos", "unk")
_TRAINER_OPTIONS = {
  **tables.read("data_pipelines.text", "tokenizer.toml")["trainer"],
  **{f"{name}_id": getattr(GEMMA3, name) for name in _SPECIAL},
  **{f"{name}_piece": f"<{name}>" for name in _SPECIAL},
}


class Tokenizer:
  """A SentencePiece model with the special tokens of `chat`.

  `vocab_size` is the number of ids, `start_of_image` and `end_of_image` open
  and close an image, `fingerprint` is the SHA-256 of the file in `model`, and
  `controls` are the ids that text never gives and decoding leaves out.
  """

  chat = GEMMA3

  def __init__(self, path: str | os.PathLike[str], model: bytes | None = None):
    """Reads the file at `path`, local or on gs://.

    It is a SentencePiece model, a GGUF file, a `tokenizer.json` of Hugging
    Face, or "gemma" for `$GEMMA_CACHE_DIR/tokenizer/tokenizer_gemma3.model`.
    It is not read if `model` is given.
    """
    self._path, chat = os.fspath(path), self.chat
    self.model = _read_model(self._path) if model is None else model
    self.fingerprint = hashlib.sha256(self.model).hexdigest()
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      sentencepiece_import.check_pieces(self.model)
      self._processor.LoadFromSerializedProto(self.model)
    except (RuntimeError, ValueError) as error:
      raise ValueError(
        f"tokenizer file {self._path} is not a SentencePiece model: "
        f"{untrusted.shorten(str(error), 200)}; {_REMEDY}."
      ) from error
    self.vocab_size = self._processor.GetPieceSize()
    self._check_layout()
    image_ids = [self._processor.PieceToId(name) for name in chat.image_names]
    self.start_of_image, self.end_of_image = image_ids
    controls = {*range(chat.end_of_turn + 1), *image_ids}
    self.controls = frozenset(controls - {chat.unk})
    names = sorted(self._processor.IdToPiece(i) for i in self.controls)
    self._control_names = re.compile("|".join(map(re.escape, names)))

  def __reduce__(self):
    """Pickles with the model, so that worker processes need no file."""
    return type(self), (self._path, self.model)

  def encode(self, text: str) -> list[int]:
    """Encodes plain text, in which "<end_of_turn>" ends no turn."""
    ids: list[int] = []
    start = 0
    if not text:  # As half the parts of a prompt are.
      return ids
    # Names of control tokens are cut after the first character: neither half is
    # a name, nor part of another name.
    for match in self._control_names.finditer(text):
      ids += self._processor.Encode(text[start : match.start() + 1])
      start = match.start() + 1
    return ids + self._processor.Encode(text[start:])

  def decode(self, ids: Sequence[int]) -> str:
    """Decodes ids up to the first stop id, without control tokens or images."""
    stops, controls = self.chat.stop_ids, self.controls
    kept = itertools.takewhile(lambda x: x not in stops, map(int, ids))
    known = (x for x in kept if 0 <= x < self.vocab_size and x not in controls)
    return self._processor.Decode(list(known))

  def transcribe(self, ids: Sequence[int]) -> str:
    """Decodes a prompt: control tokens by name, images as `[image 1]`."""
    parts, num_images = [], 0
    controls = {x: x for x in [*self.controls, self.chat.image_placeholder]}
    for control, run in itertools.groupby(map(int, ids), controls.get):
      if control is None:
        parts.append(self._processor.Decode(list(run)))
      elif control == self.chat.image_placeholder:
        num_images += 1
        parts.append(f"[image {num_images}]")
      else:
        parts += [self._processor.IdToPiece(x) for x in run]
    return "".join(parts)

  def _check_layout(self) -> None:
    chat = self.chat
    expected = {name: token for token, name in chat.names.items()}
    # A small vocabulary has the image tokens at other ids.
    if self.vocab_size > max(chat.image_ids):
      expected |= zip(chat.image_names, chat.image_ids, strict=True)
    for name, token in expected.items():
      found = self._processor.PieceToId(name)
      if found != token or self.vocab_size <= chat.end_of_turn:
        raise ValueError(
          f"tokenizer file {self._path} has {name!r} at id {found}, and must "
          f"have it at {token} as Gemma 3 has; {_REMEDY}."
        )
    for name in chat.image_names:
      if self._processor.PieceToId(name) == chat.unk:
        reason = f"tokenizer file {self._path} has no {name}; {_REMEDY}."
        raise ValueError(reason)


def _read_model(path: str) -> bytes:
  """Reads a SentencePiece model, or makes one from another format."""
  if path == GEMMA:
    folder = os.environ.get("GEMMA_CACHE_DIR", "~/.gemma")
    path = f"{folder}/tokenizer/tokenizer_gemma3.model"
  file = epath.Path(path).expanduser()
  if file.suffix == ".gguf":
    copy = host_copy(file, what="the tokenizer")
    return sentencepiece_import.from_gguf(copy)
  try:
    content = untrusted.read_bytes(file, untrusted.MAX_JSON_BYTES)
  except (OSError, ValueError) as error:
    reason = str(error).removesuffix(".")
    raise ValueError(
      f"tokenizer file {file} must be a file that can be read: {reason}; give "
      "Gemma 3's tokenizer.model, a .gguf file, a tokenizer.json, or gemma for "
      "the gemma library's file in $GEMMA_CACHE_DIR."
    ) from error
  if file.suffix == ".json":
    return sentencepiece_import.from_tokenizer_json(content, str(file))
  return content


def train(
  texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int
) -> None:
  """Writes a small SentencePiece model of `texts` with Gemma's special ids.

  Equal texts in equal order give equal files, byte for byte, of at most
  `vocab_size` ids. Gemma's own image ids do not fit, so image tokens follow the
  newlines. The file is replaced whole or not at all.
  """
  special = ["<mask>", "[multimodal]", *(f"<unused{i}>" for i in range(99))]
  special += [name for i, name in GEMMA3.names.items() if i > GEMMA3.unk]
  special += [*GEMMA3.image_names, "<answer>", "</answer>"]
  room = vocab_size - (GEMMA3.unk + 1) - len(special) - _NUM_BYTES
  if room < _MIN_TEXT_PIECES:
    least = vocab_size + _MIN_TEXT_PIECES - room
    raise ValueError(
      f"vocab_size ({vocab_size}) must be at least {least}, to leave room for "
      "text after the special tokens and the single bytes."
    )
  texts = [text for text in texts if text.strip()]
  if not texts:
    raise ValueError("there is no text to train a tokenizer on.")
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=_common_characters(texts, most=room // 2),
    model_writer=model,
    vocab_size=vocab_size,
    user_defined_symbols=special,
    **_TRAINER_OPTIONS,
  )
  unfinished = f"{os.fspath(path)}.unfinished"
  with open(unfinished, "wb") as file:
    file.write(model.getvalue())
  os.replace(unfinished, path)


def _common_characters(texts: Sequence[str], most: int) -> Iterator[str]:
  """The texts with only the `most` commonest characters.

  SentencePiece fails if characters outgrow the vocabulary, as in Chinese;
  others are encoded as bytes.
  """
  counts = collections.Counter(char for text in texts for char in text)
  ranked = sorted(counts, key=lambda char: (-counts[char], char))
  rare = dict.fromkeys(map(ord, ranked[most:]), "\n")
  return (text.translate(rare) for text in texts)
