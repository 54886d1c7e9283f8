"""The special tokens of Gemma 3's chat format.

Everything that needs a special token finds it here, so that another model
family can bring a format of its own.

References:
  Gemma 3: https://arxiv.org/abs/2503.19786
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ChatFormat:
  """Ids and names of a family's special tokens, and the words of its turns."""

  names: dict[int, str]  # The name of each special token outside images, by id.
  pad: int
  eos: int
  bos: int
  unk: int
  start_of_turn: int
  end_of_turn: int  # Also ends a completion.
  newline: int
  blank_line: int  # Surrounds an image.
  image_names: tuple[str, str]  # The tokens that open and close an image.
  # Ids of the image tokens in the family's own vocabulary. Smaller vocabularies
  # have them elsewhere; see `Tokenizer.start_of_image`.
  image_ids: tuple[int, int]
  # Stands for one soft token of an image. Outside every vocabulary, so that no
  # text contains it and no sampler draws it.
  image_placeholder: int
  vocab_size: int  # Pieces of the family's own vocabulary.
  user: str  # Opens the user's turn, after `start_of_turn`.
  model: str  # Opens the model's turn, after `start_of_turn`.

  @property
  def stop_ids(self) -> tuple[int, int]:
    """The ids that end a completion."""
    return self.eos, self.end_of_turn


GEMMA3 = ChatFormat(
  names={
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unk>",
    105: "<start_of_turn>",
    106: "<end_of_turn>",
    107: "\n",
    108: "\n\n",
  },
  pad=0,
  eos=1,
  bos=2,
  unk=3,
  start_of_turn=105,
  end_of_turn=106,
  newline=107,
  blank_line=108,
  image_names=("<start_of_image>", "<end_of_image>"),
  image_ids=(255_999, 256_000),
  image_placeholder=-2,
  vocab_size=262_144,
  user="user\n",
  model="model\n",
)
