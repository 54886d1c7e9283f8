"""The special tokens of Gemma 3's chat format, for all who need one.

References:
  Gemma 3: https://arxiv.org/abs/2503.19786
"""

import dataclasses

_NAMES = {
  0: "<pad>",
  1: "<eos>",
  2: "<bos>",
  3: "<unk>",
  105: "<start_of_turn>",
  106: "<end_of_turn>",
  107: "\n",
  108: "\n\n",
}


@dataclasses.dataclass(frozen=True)
class ChatFormat:
  """Ids and names of special tokens, and the words of turns, of Gemma 3."""

  # The name of each special token outside images, by id.
  names: dict[int, str] = dataclasses.field(default_factory=lambda: _NAMES)
  pad: int = 0
  eos: int = 1
  bos: int = 2
  unk: int = 3
  start_of_turn: int = 105
  end_of_turn: int = 106  # Also ends a completion.
  newline: int = 107
  blank_line: int = 108  # Surrounds an image.
  # The tokens that open and close an image, and their ids in the family's own
  # vocabulary. Smaller ones have others: see `Tokenizer.start_of_image`.
  image_names: tuple[str, str] = ("<start_of_image>", "<end_of_image>")
  image_ids: tuple[int, int] = (255_999, 256_000)
  # Stands for one soft token of an image. Outside every vocabulary, so that no
  # text contains it and no sampler draws it.
  image_placeholder: int = -2
  vocab_size: int = 262_144  # Pieces of the family's own vocabulary.
  user: str = "user\n"  # Opens the user's turn, after `start_of_turn`.
  model: str = "model\n"  # Opens the model's turn, after `start_of_turn`.

  @property
  def stop_ids(self) -> tuple[int, int]:
    """The ids that end a completion."""
    return self.eos, self.end_of_turn


GEMMA3 = ChatFormat()
