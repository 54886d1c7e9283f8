"""The prompts of a run: its template, tried out, and its solved examples."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data_pipelines import records
from data_pipelines.text import chat_prompts
from data_pipelines.verifier import verify

# Records of a source that are looked at for examples, or try a template.
_MAX_LOOKS, _MAX_TRIES = 5_000, 16


def complete(
  template: chat_prompts.Template,
  *,
  few_shot: int,
  seed: int,
  train: Sequence[records.Source],
  asked: Sequence[records.Source],
) -> chat_prompts.Template:
  """Adds solved examples, and tries a template's file on problems asked.

  The seed draws `few_shot` examples from the problems of `train`.
  """
  if few_shot:
    examples = _draw(template, few_shot, seed, train)
    template = dataclasses.replace(
      template, few_shot=few_shot, examples=examples
    )
  if template.file:
    # From the first to the last: a mixture has one set after the other.
    tried = [
      chat_prompts.variables(problem, template)
      for source in asked
      for problem in _readable(
        source, range(0, len(source), -(-len(source) // _MAX_TRIES) or 1)
      )
    ]
    template.file.try_out(tried)
  return template


def _readable(
  source: records.Source, indices: Iterable[int]
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
    completion = chat_prompts.demonstration(problem, template=template)
    if not problem.images and verify.verify(completion, problem).correct:
      found.setdefault(problem.question, problem)
  if len(found) < few_shot:
    raise ValueError(
      f"data.few_shot ({few_shot}) must be at most {len(found)}, the problems "
      "with an answer and without images that were found in the train split; "
      f"set data.few_shot={len(found)}."
    )
  return tuple(found.values())
