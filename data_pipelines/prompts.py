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

from data_pipelines import records, verifier
from data_pipelines import tokenizer as tokens


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
  answer = verifier.final_answer(problem)
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
  template: Template = TAGGED,
) -> list[int]:
  """The user's turn and the opening of the model's.

  Images come before the text, so that the first one stands at the same
  indices in every prompt, and attention masks over it can be static.

  Args:
    problem: What is asked.
    tokenizer: Where the ids come from.
    num_images: Pictures shown; 0 for a model that cannot see.
    soft_tokens: Placeholders for each picture.
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
    *image * num_images,
    *tokenizer.encode(prompt_text(problem, template=template)),
    tokens.END_OF_TURN,
    tokens.NEWLINE,
    tokens.START_OF_TURN,
    *tokenizer.encode("model\n"),
  ]


def encode_completion(text: str, tokenizer: tokens.Tokenizer) -> list[int]:
  """The ids of a whole reply, with the end of turn that stops it."""
  return [*tokenizer.encode(text), tokens.END_OF_TURN]
