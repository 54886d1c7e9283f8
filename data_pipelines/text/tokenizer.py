"""Text to token ids and back, in the layout of Gemma's vocabulary.

One class reads Gemma's own SentencePiece file and the small ones that `train`
makes, or builds the former from what other formats keep of it; everything that
needs a special token finds it here. Knows nothing of chat turns or images
beyond the names of their tokens.

References:
  SentencePiece: https://arxiv.org/abs/1808.06226
  Gemma 3: https://arxiv.org/abs/2503.19786
"""

import collections
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece
from etils import epath

from data_pipelines.text import sentencepiece_import

# Stands for the file that the `gemma` library reads, in the folder where it
# looks for it.
GEMMA = "gemma"
PAD, EOS, BOS, UNK = 0, 1, 2, 3
START_OF_TURN, END_OF_TURN = 105, 106
NEWLINE, BLANK_LINE = 107, 108
STOP_IDS = (EOS, END_OF_TURN)
# Stands for one soft token of an image. Outside every vocabulary, so that no
# text can hold it and no sampler can draw it.
IMAGE_PLACEHOLDER = -2

_NAMED = {
  PAD: "<pad>",
  EOS: "<eos>",
  BOS: "<bos>",
  UNK: "<unk>",
  START_OF_TURN: "<start_of_turn>",
  END_OF_TURN: "<end_of_turn>",
  NEWLINE: "\n",
  BLANK_LINE: "\n\n",
}
_START_OF_IMAGE, _END_OF_IMAGE = "<start_of_image>", "<end_of_image>"
_UNUSED = 99
# Gemma 3's own vocabulary, and where it has the two.
GEMMA_VOCAB_SIZE = 262_144
_GEMMA_IMAGE_IDS = (255_999, 256_000)


class Tokenizer:
  """A SentencePiece model whose special ids are Gemma's.

  Attributes:
    vocab_size: Number of ids; valid ids are 0 to `vocab_size - 1`.
    start_of_image: The id that opens an image.
    end_of_image: The id that closes an image.
    fingerprint: SHA-256 of the model file, in hexadecimal.
  """

  def __init__(self, path: str | os.PathLike[str], model: bytes | None = None):
    """Reads the file at `path`, here or on gs://.

    Args:
      path: A SentencePiece model; a GGUF file, of which the metadata are read;
        a `tokenizer.json` of Hugging Face's; or "gemma" for
        `$GEMMA_CACHE_DIR/tokenizer/tokenizer_gemma3.model`.
      model: The SentencePiece model that was made of it, if it was read before.

    Raises:
      ValueError: There is no such file, or its special tokens stand elsewhere
        than Gemma's.
    """
    self._path = os.fspath(path)
    self._model = _model(self._path) if model is None else model
    self.fingerprint = hashlib.sha256(self._model).hexdigest()
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(self._model)
    except RuntimeError as error:
      raise ValueError(
        f"tokenizer file {self._path} is not a SentencePiece model; give "
        "Gemma's tokenizer.model or one made by data_pipelines.prepare."
      ) from error
    self.vocab_size = self._processor.GetPieceSize()
    self._check_layout()
    self.start_of_image = self._processor.PieceToId(_START_OF_IMAGE)
    self.end_of_image = self._processor.PieceToId(_END_OF_IMAGE)
    self._controls = frozenset(range(END_OF_TURN + 1)) - {UNK} | {
      self.start_of_image,
      self.end_of_image,
    }
    names = sorted(self._processor.IdToPiece(i) for i in self._controls)
    self._control_names = re.compile("|".join(map(re.escape, names)))

  def __reduce__(self):
    """Pickles with the model, so that a worker process need not find it."""
    return type(self), (self._path, self._model)

  def encode(self, text: str) -> list[int]:
    """The ids of plain text: no id of a control token is ever among them.

    Gemma's model would read "<end_of_turn>" in a question as the end of the
    turn; here every control token's name is spelt out in ordinary pieces.
    """
    ids: list[int] = []
    start = 0
    # A name cut after its first character is no name, and neither half can be
    # part of another one.
    for match in self._control_names.finditer(text):
      ids += self._processor.Encode(text[start : match.start() + 1])
      start = match.start() + 1
    return ids + self._processor.Encode(text[start:])

  def decode(self, ids: Sequence[int]) -> str:
    """The text up to the first stop id, without control tokens or images."""
    kept = []
    for token in ids:
      token = int(token)
      if token in STOP_IDS:
        break
      if 0 <= token < self.vocab_size and token not in self._controls:
        kept.append(token)
    return self._processor.Decode(kept)

  def _check_layout(self) -> None:
    for token, name in _NAMED.items():
      found = self._processor.PieceToId(name)
      if found != token or self.vocab_size <= END_OF_TURN:
        raise ValueError(
          f"tokenizer file {self._path} has {name!r} at id {found}, and must "
          f"have it at {token} as Gemma 3's does; give Gemma 3's "
          "tokenizer.model or one made by data_pipelines.prepare."
        )
    for name in (_START_OF_IMAGE, _END_OF_IMAGE):
      if self._processor.PieceToId(name) == UNK:
        raise ValueError(
          f"tokenizer file {self._path} has no {name}; give Gemma 3's "
          "tokenizer.model or one made by data_pipelines.prepare."
        )
    if self.vocab_size <= _GEMMA_IMAGE_IDS[1]:
      return
    for name, token in zip(
      (_START_OF_IMAGE, _END_OF_IMAGE), _GEMMA_IMAGE_IDS, strict=True
    ):
      found = self._processor.PieceToId(name)
      if found != token:
        raise ValueError(
          f"tokenizer file {self._path} has {name} at id {found}, and must "
          f"have it at {token} as Gemma 3's does; give Gemma 3's "
          "tokenizer.model."
        )


def _model(path: str) -> bytes:
  """The SentencePiece model that a file is, or that its vocabulary makes."""
  folder = os.environ.get("GEMMA_CACHE_DIR", "~/.gemma")
  file = epath.Path(path)
  if path == GEMMA:
    file = epath.Path(folder) / "tokenizer" / "tokenizer_gemma3.model"
  file = file.expanduser()
  try:
    if file.suffix == ".gguf":
      return sentencepiece_import.of_gguf(file)
    content = file.read_bytes()
  except OSError as error:
    raise ValueError(
      f"tokenizer file {file} must be a file that can be read: {error}; give "
      "Gemma 3's tokenizer.model, a .gguf file, a tokenizer.json, or gemma for "
      "the library's own in $GEMMA_CACHE_DIR."
    ) from error
  if file.suffix == ".json":
    return sentencepiece_import.of_tokenizer_json(content, str(file))
  return content


def train(
  texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int
) -> None:
  """Writes a small SentencePiece model of `texts`, laid out as Gemma's.

  The same texts in the same order give the same file, byte for byte. Image
  tokens follow the newlines at once, since Gemma's own ids (255999, 256000)
  would not fit, and the answer tag gets pieces of its own.

  Args:
    texts: What the vocabulary should spell well, for example the prompts and
      worked answers of a data set.
    path: Where the model goes; replaced whole or not at all.
    vocab_size: At most so many ids; fewer if the texts hold fewer pieces.

  Raises:
    ValueError: `vocab_size` leaves no room for text, or there is no text.
  """
  special = ["<mask>", "[multimodal]"]
  special += [f"<unused{i}>" for i in range(_UNUSED)]
  special += [_NAMED[i] for i in range(START_OF_TURN, BLANK_LINE + 1)]
  special += [_START_OF_IMAGE, _END_OF_IMAGE, "<answer>", "</answer>"]
  room = vocab_size - (UNK + 1) - len(special) - 256  # 256 bytes as fallback.
  if room < 32:
    raise ValueError(
      f"vocab_size ({vocab_size}) must be at least {vocab_size + 32 - room}: "
      "special tokens and single bytes come first."
    )
  texts = [text for text in texts if text.strip()]
  if not texts:
    raise ValueError("texts hold no text to train a tokenizer on.")
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.Train(
    sentence_iterator=_common_characters(texts, most=room // 2),
    model_writer=model,
    model_type="bpe",
    vocab_size=vocab_size,
    hard_vocab_limit=False,
    character_coverage=1.0,
    byte_fallback=True,
    split_digits=True,
    # Pieces may span words: the hint that opens each prompt becomes one or
    # two, which halves what a small model has to read.
    split_by_whitespace=False,
    split_by_unicode_script=False,
    max_sentencepiece_length=128,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    max_sentence_length=1 << 30,
    num_threads=1,
    pad_id=PAD,
    eos_id=EOS,
    bos_id=BOS,
    unk_id=UNK,
    pad_piece=_NAMED[PAD],
    eos_piece=_NAMED[EOS],
    bos_piece=_NAMED[BOS],
    unk_piece=_NAMED[UNK],
    user_defined_symbols=special,
    minloglevel=2,
  )
  unfinished = f"{os.fspath(path)}.unfinished"
  with open(unfinished, "wb") as file:
    file.write(model.getvalue())
  os.replace(unfinished, path)


def _common_characters(texts: Sequence[str], most: int) -> Iterator[str]:
  """The texts with all but the `most` commonest characters cut out.

  SentencePiece keeps every character that it must cover, and fails when they
  outgrow the vocabulary, as Chinese text would; the rest is spelt in bytes.
  """
  counts = collections.Counter(char for text in texts for char in text)
  ranked = sorted(counts, key=lambda char: (-counts[char], char))
  rare = dict.fromkeys(map(ord, ranked[most:]), "\n")
  return (text.translate(rare) for text in texts)
