"""From a problem to the chat turn that asks it, and back from a worked answer.

A template says what is asked for beyond the official query, and how a reply
that follows it is written. Knows the turn's layout, not the model: images are
runs of placeholders.

References:
  Gemma 3's chat and image layout: https://arxiv.org/abs/2503.19786
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence

from data_pipelines import records
from data_pipelines.text import tokenizer as tokens
from data_pipelines.verifier import verify


@dataclasses.dataclass(frozen=True)
class Template:
  """How to reply: as the prompt says it, and as a reply does it.

  Attributes:
    instruction: What follows the official query; "" leaves that alone.
    reasoning: What opens and closes the reasoning of a reply that has any.
    answer: What opens and closes its answer.
  """

  instruction: str
  reasoning: tuple[str, str]
  answer: tuple[str, str]

  @property
  def fingerprint(self) -> str:
    """SHA-256 of all its text, in hexadecimal."""
    text = json.dumps(dataclasses.asdict(self), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


TAGGED = Template(
  instruction="Write the final answer as <answer>...</answer>.",
  reasoning=("", ""),
  answer=("<answer>", "</answer>"),
)
# Each is one that the verifier reads.
TEMPLATES = {
  "tagged": TAGGED,
  "boxed": Template(
    instruction=r"Write the final answer as \boxed{...}.",
    reasoning=("", ""),
    answer=(r"\boxed{", "}"),
  ),
  "plain": Template(
    instruction="", reasoning=("", ""), answer=("The answer is ", ".")
  ),
  "reasoned": Template(
    instruction=(
      "Write your reasoning as <reasoning>...</reasoning>, then the final "
      "answer as <answer>...</answer>."
    ),
    reasoning=("<reasoning>", "</reasoning>"),
    answer=("<answer>", "</answer>"),
  ),
}

# Before a picture that is also shown in crops, and before these.
_CROPS = (
  "Here is the original image ",
  " and here are some crops to help you see better ",
)


def prompt_text(
  problem: records.Problem, *, template: Template = TAGGED
) -> str:
  """What the user says: the official query, unaltered, and how to reply."""
  if not template.instruction:
    return problem.query
  return f"{problem.query}\n{template.instruction}"


def demonstration(
  problem: records.Problem, *, template: Template = TAGGED
) -> str:
  """A right reply: the worked solution, if any, and the answer."""
  answer = verify.final_answer(problem)
  return with_answer(problem.solution, answer, template=template)


def with_answer(
  reasoning: str, answer: str, *, template: Template = TAGGED
) -> str:
  """A reply: the reasoning, if any, and this answer, right or wrong."""
  opened, closed = template.answer
  reply = f"{opened}{answer}{closed}"
  if not reasoning:
    return reply
  opened, closed = template.reasoning
  return f"{opened}{reasoning}{closed} {reply}"


def chat_text(problem: records.Problem) -> str:
  """Both turns as plain text, to train a tokenizer on.

  In the one template, so that a data dir's tokenizer is the same whatever the
  runs that read it ask for.
  """
  return f"user\n{prompt_text(problem)}\nmodel\n{demonstration(problem)}"


def encode_prompt(
  problem: records.Problem,
  tokenizer: tokens.Tokenizer,
  *,
  num_images: int,
  soft_tokens: int,
  num_crops: int = 0,
  template: Template = TAGGED,
) -> list[int]:
  """The user's turn and the opening of the model's.

  Images come before the text, so that prompts which show as many have them at
  the same indices, and attention masks over them can be static.

  Args:
    problem: What is asked.
    tokenizer: Where the ids come from.
    num_images: Pictures shown; 0 for a model that cannot see.
    soft_tokens: Placeholders for each picture, and for each crop.
    num_crops: Crops shown after each picture, in the words of transformers'
      Gemma3Processor.
    template: How to reply.

  Returns:
    Ids that end where the model's reply begins.
  """
  image = [
    tokens.BLANK_LINE,
    tokenizer.start_of_image,
    *[tokens.IMAGE_PLACEHOLDER] * soft_tokens,
    tokenizer.end_of_image,
    tokens.BLANK_LINE,
  ]
  return [
    tokens.BOS,
    tokens.START_OF_TURN,
    *tokenizer.encode("user\n"),
    *_with_crops(image, num_crops, tokenizer) * num_images,
    *tokenizer.encode(prompt_text(problem, template=template)),
    tokens.END_OF_TURN,
    tokens.NEWLINE,
    tokens.START_OF_TURN,
    *tokenizer.encode("model\n"),
  ]


def check_images(
  ids: Sequence[int],
  tokenizer: tokens.Tokenizer,
  *,
  num_images: int,
  soft_tokens: int,
) -> None:
  """Passes a prompt that has a run of placeholders for every image it shows.

  The model takes soft tokens as they come: with one too many or too few it
  would read another image's without a word.

  Args:
    ids: The prompt.
    tokenizer: Whose ids they are.
    num_images: Pictures and crops that come with it.
    soft_tokens: Placeholders for each.

  Raises:
    BadRecord: "image_count" where <start_of_image> or the placeholders after
      it are not as many.
  """
  starts = [
    i for i, token in enumerate(ids) if token == tokenizer.start_of_image
  ]
  if len(starts) != num_images:
    raise records.BadRecord(
      "image_count",
      f"the prompt has {len(starts)} <start_of_image> for {num_images} images",
    )
  run = [tokens.IMAGE_PLACEHOLDER] * soft_tokens
  runs = sum(list(ids[i + 1 : i + 1 + soft_tokens]) == run for i in starts)
  placeholders = list(ids).count(tokens.IMAGE_PLACEHOLDER)
  if runs != num_images or placeholders != num_images * soft_tokens:
    raise records.BadRecord(
      "image_count",
      f"the prompt has {placeholders} placeholders, of which {runs} runs of "
      f"{soft_tokens} follow a <start_of_image>, for {num_images} images",
    )


def encode_completion(text: str, tokenizer: tokens.Tokenizer) -> list[int]:
  """The ids of a whole reply, with the end of turn that stops it."""
  return [*tokenizer.encode(text), tokens.END_OF_TURN]


def _with_crops(
  image: list[int], num_crops: int, tokenizer: tokens.Tokenizer
) -> list[int]:
  """The ids of a picture, and of its crops with words around them."""
  if not num_crops:
    return image
  original, crops = map(tokenizer.encode, _CROPS)
  ids = [*original, *image, *crops, *image]
  for _ in range(num_crops - 1):
    ids += [*tokenizer.encode(" "), *image]
  return ids
