"""The prompts of a run: its template, tried out, and its solved examples."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence

import numpy as np

from data_pipelines import records
from data_pipelines.text import chat_prompts
from data_pipelines.verifier import verify

# Records that are looked at for examples, and problems that try a template.
_MAX_LOOKS, _MAX_TRIES = 5_000, 16


def complete(
  template: chat_prompts.Template,
  *,
  system: str,
  few_shot: int,
  seed: int,
  train: Sequence[records.Source],
  asked: Sequence[records.Source],
) -> chat_prompts.Template:
  """Adds the system text and the examples, and tries a template's file.

  Args:
    template: The template without either.
    system: The setting `data.system_prompt`.
    few_shot: The setting `data.few_shot`.
    seed: Draws the examples.
    train: The problems that examples are drawn from.
    asked: The problems that the run asks.

  Raises:
    ValueError: There are too few examples, or the file cannot write prompts.
  """
  template = dataclasses.replace(template, system=system)
  if few_shot:
    drawn = _draw(template, few_shot, seed, train)
    template = dataclasses.replace(template, few_shot=few_shot, examples=drawn)
  if template.file:
    first = [
      problem
      for source in asked
      for problem in itertools.islice(
        _readable(source, range(len(source))), _MAX_TRIES
      )
    ]
    _try_out(template, first)
  return template


def _readable(
  source: records.Source, indices: Sequence[int]
) -> Iterator[records.Problem]:
  for index in indices:
    try:
      yield source[int(index)]
    except (ValueError, OSError):
      continue  # The run leaves it out too.


def _draw(
  template: chat_prompts.Template,
  few_shot: int,
  seed: int,
  train: Sequence[records.Source],
) -> tuple[records.Problem, ...]:
  """Draws examples with different questions, and a spare one if there is."""
  rng = np.random.default_rng([seed, 2])
  problems = itertools.chain.from_iterable(
    _readable(source, rng.permutation(len(source))[:_MAX_LOOKS])
    for source in train
  )
  found: dict[str, records.Problem] = {}
  for problem in problems:
    if len(found) > few_shot:
      break
    if problem.images or not problem.is_checkable:
      continue
    completion = chat_prompts.demonstration(problem, template=template)
    if verify.verify(completion, problem).correct:
      found.setdefault(problem.question, problem)
  if len(found) < few_shot:
    raise ValueError(
      f"data.few_shot ({few_shot}) must be at most {len(found)}, the problems "
      "with an answer and without pictures that were found in the train split; "
      f"set data.few_shot={len(found)}."
    )
  return tuple(found.values())


def _try_out(
  template: chat_prompts.Template, problems: Sequence[records.Problem]
) -> None:
  """Refuses a file that fails for a problem or leaves out all questions."""
  file = template.file
  assert file
  texts = file.try_out([chat_prompts.variables(x, template) for x in problems])
  for problem, text in zip(problems, texts, strict=True):
    marks, count = text.count(records.IMAGE_MARK), len(problem.images)
    if marks not in (0, count):
      reason = (
        f"it writes {marks} marks for the {count} images of {problem.pid}"
      )
      raise file.refuse(reason, "write {{ images }}, which fits every problem")
  shown = [
    _letters(problem.question) in _letters(text)
    for problem, text in zip(problems, texts, strict=True)
  ]
  if shown and not any(shown):
    reason = "it leaves out the question" if any(texts) else "it writes no text"
    raise file.refuse(reason, "write {{ question }} or {{ query }} in it")


def _letters(text: str) -> str:
  """The letters and digits, in one case."""
  return re.sub(r"[\W_]+", "", text.replace(records.IMAGE_MARK, "")).casefold()
