"""From a problem to the chat turn that asks it, and back from a worked answer.

Knows the turn's layout, not the model: images are runs of placeholders.

References:
  Gemma 3's chat and image layout: https://arxiv.org/abs/2503.19786
"""

from data_pipelines import records, verifier
from data_pipelines import tokenizer as tokens

FORMAT_INSTRUCTION = "Write the final answer as <answer>...</answer>."


def prompt_text(problem: records.Problem) -> str:
  """What the user says: the official query, unaltered, and how to reply."""
  return f"{problem.query}\n{FORMAT_INSTRUCTION}"


def demonstration(problem: records.Problem) -> str:
  """A right reply: the worked solution, if any, and the tagged answer."""
  return with_answer(problem, verifier.final_answer(problem))


def with_answer(problem: records.Problem, answer: str) -> str:
  """The worked solution, if any, ending in this answer, right or wrong."""
  tagged = f"<answer>{answer}</answer>"
  return f"{problem.solution} {tagged}" if problem.solution else tagged


def chat_text(problem: records.Problem) -> str:
  """Both turns as plain text, to train a tokenizer on."""
  return f"user\n{prompt_text(problem)}\nmodel\n{demonstration(problem)}"


def encode_prompt(
  problem: records.Problem,
  tokenizer: tokens.Tokenizer,
  *,
  num_images: int,
  soft_tokens: int,
) -> list[int]:
  """The user's turn and the opening of the model's.

  Images come before the text, so that the first one stands at the same
  indices in every prompt, and attention masks over it can be static.

  Args:
    problem: What is asked.
    tokenizer: Where the ids come from.
    num_images: Pictures shown; 0 for a model that cannot see.
    soft_tokens: Placeholders for each picture.

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
    *tokenizer.encode(prompt_text(problem)),
    tokens.END_OF_TURN,
    tokens.NEWLINE,
    tokens.START_OF_TURN,
    *tokenizer.encode("model\n"),
  ]


def encode_completion(text: str, tokenizer: tokens.Tokenizer) -> list[int]:
  """The ids of a whole reply, with the end of turn that stops it."""
  return [*tokenizer.encode(text), tokens.END_OF_TURN]
