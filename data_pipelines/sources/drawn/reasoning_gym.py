"""Text problems of the library reasoning_gym, each with a scorer of its own.

Problem `i` of a set is a function of the settings and `i` alone. The library
draws and scores in worker processes, whose hash seed is fixed.

References:
  reasoning_gym: https://github.com/open-thought/reasoning-gym
"""

import ast
import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import io
import json
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipelines import records
from data_pipelines.text import tables
from data_pipelines.validation import at_least, check_fields, interval, require
from data_pipelines.workers import functions
from data_pipelines.workers.pool import Pool

PREFIX = "reasoning_gym:"
_DRAW = "data_pipelines.sources.drawn.reasoning_gym:draw"
# Drawn by one call of a worker, within this time; some tasks are slow.
_CHUNK, _SECONDS, _MEMORY_GIB = 25, 300.0, 4.0

_TASKS = tables.read("data_pipelines.sources.drawn", "reasoning_gym.toml")
EVALUATED = (*_TASKS["by_eval"], *_TASKS["by_sympy"])
_LITERAL = (
  *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Name, ast.BinOp),
  *(ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context),
)
# What a scorer raises for an answer that it cannot read.
_UNREADABLE = (ArithmeticError, LookupError, SyntaxError, TypeError, ValueError)


@dataclass(frozen=True)
class Spec:
  """The settings of a set of problems."""

  tasks: tuple[str, ...]  # Of the library; they take turns.
  num_problems: int = field(metadata=interval("[1, 1000000]", 10_000))
  seed: int = field(metadata=at_least(0))
  version: str = ""  # Of the library; another one may draw other problems.

  def __post_init__(self):
    check_fields(self)
    require_library()
    known = sorted(_library().factory.DATASETS)
    rule = "name tasks after the colon, each once"
    distinct = len(set(self.tasks)) == len(self.tasks)
    require(bool(self.tasks) and distinct, "source", str(self), rule, "")
    for task in self.tasks:
      names = ", ".join(difflib.get_close_matches(task, known))
      question = f"did you mean {names}? " if names else ""
      remedy = (
        f"{question}The README of the library lists all {len(known)}: "
        "https://github.com/open-thought/reasoning-gym"
      )
      rule = "name tasks of reasoning_gym"
      require(task in known, "source", PREFIX + task, rule, remedy)
      why = _TASKS["refused"].get(task, "")
      rule = f"name another task: {task} does not train, because {why}"
      require(not why, "source", PREFIX + task, rule, "")
    version = importlib.metadata.version("reasoning-gym")
    object.__setattr__(self, "version", version)

  def __str__(self):
    return PREFIX + ",".join(self.tasks)


def parse_tasks(source: str) -> tuple[str, ...]:
  """The tasks that a source "reasoning_gym:TASK,TASK" names."""
  names = source.removeprefix(PREFIX).split(",")
  return tuple(name.strip() for name in names if name.strip())


def require_library() -> None:
  """Checks that the library is installed."""
  try:
    importlib.metadata.version("reasoning-gym")
  except importlib.metadata.PackageNotFoundError as error:
    raise ValueError(
      "problems of reasoning_gym need the package reasoning-gym; install it, "
      "as by pip install --constraint constraints.txt reasoning-gym, which "
      "needs a C compiler."
    ) from error


def _library() -> Any:
  """The library, which takes more than a second to import."""
  return importlib.import_module("reasoning_gym")


type _Raw = records.Problem | records.BadRecord


@functools.lru_cache(maxsize=1)
def problems(spec: Spec) -> Sequence[_Raw]:
  """All problems of the set in order; what cannot be drawn is a reject."""
  count = -(-spec.num_problems // len(spec.tasks))
  calls = [
    (task, spec.seed, count, start, min(start + _CHUNK, count))
    for task in spec.tasks
    for start in range(0, count, _CHUNK)
  ]
  entries: dict[str, list] = {task: [] for task in spec.tasks}
  cores = min(os.cpu_count() or 1, len(calls))
  pool = Pool(
    [_DRAW],
    num_workers=cores,
    timeout_seconds=_SECONDS,
    memory_gib=_MEMORY_GIB,
  )
  with contextlib.closing(pool):
    waiting = [pool.submit(_DRAW, *call) for call in calls]
    for (task, _, _, start, stop), future in zip(calls, waiting, strict=True):
      drawn = future.result()
      if isinstance(drawn, functions.Failure):
        drawn = [drawn.reason] * (stop - start)
      entries[task] += drawn
  turns = [(task, i) for i in range(count) for task in spec.tasks]
  return [_problem(x, i, entries[x][i]) for x, i in turns[: spec.num_problems]]


def draw(
  task: str, seed: int, size: int, start: int, stop: int
) -> list[dict[str, Any] | str]:
  """Draws entries of a task, as JSON can hold them, or says why there is none.

  Only equal in processes with equal PYTHONHASHSEED, such as workers. Some tasks
  depend on the size, the number of all entries of the task.
  """
  drawn: list[dict[str, Any] | str] = []
  with contextlib.redirect_stdout(io.StringIO()):
    dataset = _dataset(task, seed, size)
    for index in range(start, stop):
      random.seed(f"{seed} {index}")
      np.random.seed([seed % 2**32, index])
      try:
        entry = json.dumps(dataset[index], allow_nan=False, default=str)
        drawn.append(json.loads(entry))
      except Exception as error:  # Whatever the library raises.
        drawn.append(functions.one_line(error))
  return drawn


@functools.lru_cache(maxsize=1)
def _dataset(task: str, seed: int, size: int) -> Any:
  return _library().create_dataset(task, seed=seed, size=size)


def _problem(task: str, index: int, entry: dict[str, Any] | str) -> _Raw:
  try:
    with records.all_faults():
      if isinstance(entry, str):
        raise records.BadRecord("not_drawn", f"{task} {index}: {entry}")
      question, answer = entry.pop("question"), entry["answer"]
      if answer is None:
        given = (entry["metadata"].get(name) for name in _TASKS["examples"])
        answer = next(each for each in given if each is not None)
      problem = records.Problem(
        pid=f"{task}-{index}",
        question=question,
        answer=answer if isinstance(answer, str) else json.dumps(answer),
        question_type="free_form",
        answer_type="scored",
        query=question,
        metadata={
          "scorer": f"{PREFIX}{task}",
          "entry": entry,
          "source": "reasoning_gym",
          "task": task,
        },
      )
      records.validate(problem)
      return problem
  except records.BadRecord as error:
    return error


def score_answer(task: str, answer: str, entry: Mapping[str, Any]) -> float:
  """The library's score of an answer, for a worker: 1.0 alone is right.

  An answer that would run as code, or that the scorer cannot read, gets 0.0.
  `entry` is `metadata["entry"]` of the problem.
  """
  metadata = entry["metadata"]
  parts = map(metadata.get, ("integrand", "problem"))
  evaluated = (answer, entry["answer"], *parts)
  if task in EVALUATED:
    is_for_sympy = task in _TASKS["by_sympy"]
    for text in evaluated:
      if text is not None and not _is_harmless(text, is_for_sympy):
        return 0.0
  if task in _TASKS["with_tuples"]:
    entry = {**entry, "metadata": _with_tuples(metadata)}
  with contextlib.redirect_stdout(io.StringIO()):
    try:
      return float(_scorer(task)(answer, entry))
    except _UNREADABLE:
      return 0.0


@functools.lru_cache(maxsize=256)
def _scorer(task: str) -> Any:
  return _library().get_score_answer_fn(task)


def _with_tuples(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {name: _with_tuples(each) for name, each in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _is_harmless(text: str, is_for_sympy: bool) -> bool:
  """True for text of numbers, names and operators, or that is no Python.

  `parse_expr` changes a text before it runs it, so that what is no Python may
  become some; it takes calls of mathematical functions.
  """
  try:
    nodes = list(ast.walk(ast.parse(text.lstrip(), mode="eval")))
  except (SyntaxError, ValueError):
    return not is_for_sympy
  for node in nodes:
    holds = isinstance(node, _LITERAL)
    if is_for_sympy and isinstance(node, ast.Call):
      name = node.func
      holds = isinstance(name, ast.Name) and name.id in _TASKS["functions"]
      holds = holds and not node.keywords
    elif is_for_sympy and isinstance(node, ast.Constant):
      holds = isinstance(node.value, int | float)
    if not holds:
      return False
  return True
