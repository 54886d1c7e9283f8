"""Encodes problems as chat prompts, and worked answers as completions.

A template adds an instruction to the official query, and writes completions
that follow the instruction. Images are runs of placeholders.

References:
  Gemma 3's chat and image layout: https://arxiv.org/abs/2503.19786
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Sequence

from data_pipelines import records
from data_pipelines.text import tokenizer as tokens


@dataclasses.dataclass(frozen=True)
class Template:
  """The instruction on how to answer, and completions that follow it."""

  instruction: str  # Text after the official query; "" adds none.
  # Texts before and after the reasoning, and the answer, of a completion.
  reasoning: tuple[str, str] = ("", "")
  answer: tuple[str, str] = ("<answer>", "</answer>")

  @property
  def fingerprint(self) -> str:
    """SHA-256 of all its text, in hexadecimal."""
    text = json.dumps(dataclasses.asdict(self), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


TAGGED = Template("Write the final answer as <answer>...</answer>.")
# The verifier reads the answers of all of them.
TEMPLATES = {
  "tagged": TAGGED,
  "boxed": Template(
    r"Write the final answer as \boxed{...}.", answer=(r"\boxed{", "}")
  ),
  "plain": Template("", answer=("The answer is ", ".")),
  "reasoned": Template(
    "Write your reasoning as <reasoning>...</reasoning>, then the final answer "
    "as <answer>...</answer>.",
    reasoning=("<reasoning>", "</reasoning>"),
  ),
}

# Text before an image that is also shown in crops, and before its crops.
_CROPS = (
  "Here is the original image ",
  " and here are some crops to help you see better ",
)


def prompt_text(
  problem: records.Problem, *, template: Template = TAGGED
) -> str:
  """The text of the user's turn: the official query and the instruction."""
  if not template.instruction:
    return problem.query
  return f"{problem.query}\n{template.instruction}"


def demonstration(
  problem: records.Problem, *, template: Template = TAGGED
) -> str:
  """A right completion: the worked solution, if any, and the answer."""
  return with_answer(problem.solution, problem.answer, template=template)


def with_answer(
  reasoning: str, answer: str, *, template: Template = TAGGED
) -> str:
  """A completion: the reasoning, if any, and this answer, right or wrong."""
  before, after = template.answer
  answer = f"{before}{answer}{after}"
  if not reasoning:
    return answer
  before, after = template.reasoning
  return f"{before}{reasoning}{after} {answer}"


def chat_text(problem: records.Problem) -> str:
  """Both turns as plain text, to train a tokenizer on.

  Always in the default template, so that a data dir's tokenizer does not depend
  on the runs that read it.
  """
  return f"user\n{prompt_text(problem)}\nmodel\n{demonstration(problem)}"


def encode_prompt(
  problem: records.Problem,
  tokenizer: tokens.Tokenizer,
  *,
  soft_tokens: int,
  num_crops: Sequence[int] | None = None,
  template: Template = TAGGED,
) -> list[int]:
  """Encodes the user's turn and the start of the model's turn.

  The pictures stand where the text has an `IMAGE_MARK` for each, or before the
  text if it has none. Each picture and each crop has `soft_tokens`
  placeholders. The crops follow their picture, with the words of transformers'
  Gemma3Processor; `num_crops` counts those of each picture.

  Raises:
    BadRecord: "image_count" if the marks are not as many as the pictures.
  """
  chat, num_images = tokenizer.chat, len(problem.images)
  image = [
    chat.blank_line,
    tokenizer.start_of_image,
    *[chat.image_placeholder] * soft_tokens,
    tokenizer.end_of_image,
    chat.blank_line,
  ]
  parts = prompt_text(problem, template=template).split(records.IMAGE_MARK)
  if len(parts) == 1:
    parts = [""] * num_images + parts
  if len(parts) != num_images + 1:
    raise records.BadRecord(
      "image_count",
      f"the prompt has {len(parts) - 1} marks {records.IMAGE_MARK} for "
      f"{num_images} pictures",
    )
  before = [
    [*tokenizer.encode(part), *_with_crops(image, count, tokenizer)]
    for part, count in zip(
      parts[:-1], num_crops or [0] * num_images, strict=True
    )
  ]
  return [
    chat.bos,
    chat.start_of_turn,
    *tokenizer.encode(chat.user),
    *itertools.chain.from_iterable(before),
    *tokenizer.encode(parts[-1]),
    chat.end_of_turn,
    chat.newline,
    chat.start_of_turn,
    *tokenizer.encode(chat.model),
  ]


def check_images(
  ids: Sequence[int],
  tokenizer: tokens.Tokenizer,
  *,
  num_images: int,
  soft_tokens: int,
) -> None:
  """Requires a run of placeholders for every image that a prompt shows.

  The model fills placeholders in order: with one too many or too few it would
  silently read another image's soft tokens. Crops count as images.

  Raises:
    BadRecord: "image_count" if <start_of_image>, or the placeholders after it,
      differ in number.
  """
  placeholder = tokenizer.chat.image_placeholder
  run = [placeholder] * soft_tokens
  starts = [i for i, x in enumerate(ids, 1) if x == tokenizer.start_of_image]
  runs = sum(list(ids[i : i + soft_tokens]) == run for i in starts)
  placeholders = list(ids).count(placeholder)
  found = (len(starts), runs, placeholders)
  if found != (num_images, num_images, num_images * soft_tokens):
    raise records.BadRecord(
      "image_count",
      f"the prompt has {len(starts)} <start_of_image> for {num_images} images, "
      f"and {placeholders} placeholders, of which {runs} runs of {soft_tokens} "
      "follow a <start_of_image>",
    )


def encode_completion(text: str, tokenizer: tokens.Tokenizer) -> list[int]:
  """The ids of a whole completion, with the end of turn."""
  return [*tokenizer.encode(text), tokenizer.chat.end_of_turn]


def _with_crops(
  image: list[int], num_crops: int, tokenizer: tokens.Tokenizer
) -> list[int]:
  """The ids of an image, then of its crops, with words around them."""
  if not num_crops:
    return image
  original, crops = map(tokenizer.encode, _CROPS)
  another = [*tokenizer.encode(" "), *image]
  return [*original, *image, *crops, *image, *another * (num_crops - 1)]
