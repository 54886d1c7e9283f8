"""Encodes problems as chat prompts, and worked answers as completions.

A template adds an instruction to the query, or is a file that writes the whole
text; completions follow it. Images are runs of placeholders.
"""

import contextlib
import dataclasses
import hashlib
import json
import string
from collections.abc import Sequence
from typing import Any

from data_pipelines import records
from data_pipelines.text import tables, template_files
from data_pipelines.text import tokenizer as tokens


@dataclasses.dataclass(frozen=True)
class Template:
  """The instruction on how to answer, and completions that follow it."""

  instruction: str  # Text after the query; "" adds none.
  # Texts before and after the reasoning, and the answer, of a completion.
  reasoning: tuple[str, str] = ("", "")
  answer: tuple[str, str] = ("<answer>", "</answer>")
  is_official: bool = False  # True asks MathVista's query where there is one.
  file: template_files.TemplateFile | None = None  # Writes the whole text.
  system: str = ""  # Text before the first turn's.
  few_shot: int = 0  # Solved examples in a prompt.
  # Solved problems without images, and a spare for where one is asked itself.
  examples: tuple[records.Problem, ...] = ()

  @property
  def fingerprint(self) -> str:
    """SHA-256 of its wording, without what other settings add to it."""
    names = ("instruction", "reasoning", "answer")
    parts = {name: getattr(self, name) for name in names}
    # Without these a template has the fingerprint that earlier runs recorded.
    parts |= {"is_official": True} if self.is_official else {}
    parts |= {"file": self.file.source} if self.file else {}
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


TEMPLATES: dict[str, Template] = {}
_TABLE = tables.read("data_pipelines.text", "templates.toml")
for _name, _fields in _TABLE.items():
  _pairs = {x: tuple(y) for x, y in _fields.items() if isinstance(y, list)}
  TEMPLATES[_name] = Template(**_fields | _pairs)
TAGGED = TEMPLATES["tagged"]

# What a template's file may show of the problem asked, beside the options.
_SHOWN = "question query unit precision metadata question_type answer_type"

# The name of a template's fingerprint in the record of a run.
OF_TEMPLATE = "data.prompt_template: its text"

# Text before an image that is also shown in crops, and before its crops.
_ORIGINAL = "Here is the original image "
_CROPS = " and here are some crops to help you see better "


def open_template(name: str, system: str = "") -> Template:
  """The built-in template of this name, or that of a jinja file."""
  template = TEMPLATES.get(name)
  if template is None:
    file = template_files.read(name)
    style = TEMPLATES[file.style]
    template = dataclasses.replace(style, instruction="", file=file)
  return dataclasses.replace(template, system=system)


def asks_for_tag(name: str) -> bool:
  """True if prompts ask for the <answer> tag, or if a file is not here yet."""
  with contextlib.suppress(ValueError):
    template = open_template(name)
    text = template.file.source if template.file else template.instruction
    return "<answer>" in text
  return True


def prompt_text(
  problem: records.Problem, *, template: Template = TAGGED
) -> str:
  """The text of the user's turn, with its image marks if it has any."""
  if template.file:
    # A stand-in has no question to show.
    row = problem.question and variables(problem, template)
    return template.file.render(row) if row else ""
  query = problem.query
  if template.is_official and records.has_hint(problem):
    query = records.official_query(problem)
  return f"{query}\n{template.instruction}" if template.instruction else query


def variables(problem: records.Problem, template: Template) -> dict[str, Any]:
  """The variables of a template's file, never with the problem's answer."""
  has_marks = records.IMAGE_MARK in problem.question + problem.query
  count = len(problem.images)
  return _variables(problem) | {
    "image": records.IMAGE_MARK,
    "images": "" if has_marks else records.IMAGE_MARK * count,
    "num_images": count,
    "examples": [
      _variables(each, "answer", "solution")
      | {"completion": demonstration(each, template=template)}
      for each in _examples(problem, template)
    ],
  }


def _variables(problem: records.Problem, *more: str) -> dict[str, Any]:
  """The variables that a template may show of a problem."""
  shown = {name: getattr(problem, name) for name in (*_SHOWN.split(), *more)}
  lettered = zip(string.ascii_uppercase, problem.choices, strict=False)
  return shown | {"choices": [{"letter": x, "text": y} for x, y in lettered]}


def _examples(
  problem: records.Problem, template: Template
) -> list[records.Problem]:
  """The solved problems shown with this one, which is never among them."""
  others = [x for x in template.examples if x.question != problem.question]
  return others[: template.few_shot]


def earlier_turns(
  problem: records.Problem, template: Template
) -> list[tuple[str, str]]:
  """The user's text and the completion of each example, shown as turns.

  A template's file that uses `examples` has placed them in its own text.
  """
  if not template.examples or (template.file and template.file.uses_examples):
    return []
  bare = dataclasses.replace(template, examples=())
  return [
    (prompt_text(x, template=bare), demonstration(x, template=template))
    for x in _examples(problem, template)
  ]


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
  """Both turns as plain text in the default template, to train a tokenizer."""
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
  placeholders. The crops, `num_crops` of each picture, follow it with the words
  of transformers' Gemma3Processor. The system text opens the first user's turn,
  and solved examples are earlier turns, as in Gemma 3's own template.
  """
  chat = tokenizer.chat
  text = prompt_text(problem, template=template)
  num_crops = num_crops or [0] * len(problem.images)
  shown = _encode_with_images(text, tokenizer, soft_tokens, num_crops)
  system = tokenizer.encode(f"{template.system}\n\n" * bool(template.system))
  turns: list[tuple[str, list[int]]] = []
  for asked, completion in earlier_turns(problem, template):
    turns.append((chat.user, tokenizer.encode(asked)))
    turns.append((chat.model, tokenizer.encode(completion)))
  ids = [chat.bos]
  for role, content in (*turns, (chat.user, shown)):
    ids += [chat.start_of_turn, *tokenizer.encode(role), *system, *content]
    ids += [chat.end_of_turn, chat.newline]
    system = []
  return [*ids, chat.start_of_turn, *tokenizer.encode(chat.model)]


def _encode_with_images(
  text: str,
  tokenizer: tokens.Tokenizer,
  soft_tokens: int,
  num_crops: Sequence[int],
) -> list[int]:
  """Encodes a text with its pictures and their crops."""
  chat = tokenizer.chat
  image = [
    chat.blank_line,
    tokenizer.start_of_image,
    *[chat.image_placeholder] * soft_tokens,
    tokenizer.end_of_image,
    chat.blank_line,
  ]
  parts = text.split(records.IMAGE_MARK)
  if len(parts) == 1:
    parts = [""] * len(num_crops) + parts
  if len(parts) != len(num_crops) + 1:
    raise records.BadRecord(
      "image_count",
      f"the prompt has {len(parts) - 1} marks {records.IMAGE_MARK} for "
      f"{len(num_crops)} pictures",
    )
  ids: list[int] = []
  for part, count in zip(parts, num_crops, strict=False):
    ids += tokenizer.encode(part)
    # Before the image, its first crop and each other crop.
    words = [_ORIGINAL, _CROPS, *[" "] * (count - 1)] if count else [""]
    for each in words:
      ids += [*tokenizer.encode(each), *image]
  return ids + tokenizer.encode(parts[-1])


def check_images(
  ids: Sequence[int],
  tokenizer: tokens.Tokenizer,
  *,
  num_images: int,
  soft_tokens: int,
) -> None:
  """Requires a run of placeholders for every image or crop of a prompt.

  The model fills placeholders in order: with one too many or too few it would
  silently read another image's soft tokens.
  """
  run = [tokenizer.chat.image_placeholder] * soft_tokens
  starts = [i for i, x in enumerate(ids, 1) if x == tokenizer.start_of_image]
  runs = sum(list(ids[i : i + soft_tokens]) == run for i in starts)
  placeholders = list(ids).count(tokenizer.chat.image_placeholder)
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
