"""Answers a person's questions, for --mode=answer; writes no file.

Text alone goes to standard output, as its tokens come; the rest is log.
"""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import logging

from data_pipelines import dataset, images, pipeline, records
from data_pipelines.storage.paths import to_path
from data_pipelines.text import untrusted
from data_pipelines.validation import (
  SettingError,
  printable,
  require,
  user_errors,
)
from grpo_tpu.checkpoint import load
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import activity, interrupt, sharding
from grpo_tpu.rollout.sampler import Sampler

_HELP = (
  "Type a question. Each is answered on its own, without those before it. "
  "/image FILE shows a picture with it, /image shows none; an empty line ends."
)
# An incomplete character is decoded as up to three of these.
_INCOMPLETE, _MOST_INCOMPLETE = "\N{REPLACEMENT CHARACTER}", 3


def open_answers(
  config: Config,
  question: str | None,
  image_files: Sequence[str],
  temperature: float,
  num_answers: int,
) -> Callable[[], None]:
  """Checks the flags and the first question; returns what answers them all.

  Raises:
    ValueError: A flag is wrong, or the model cannot be asked this.
  """
  is_finite, rule = math.isfinite(temperature), "be a finite number"
  require(is_finite, "--temperature", temperature, rule, "give 0 or 1")
  pictures = [_read_picture(file) for file in image_files]
  data = dataset.open_prompts(
    config.data, config.model_inputs, seed=config.seed
  )
  if question is not None:
    problems = [data.make_question(question, pictures)]
  else:
    problems = _read_questions(data, pictures)
    first = list(itertools.islice(problems, 1))
    rule = "be given, or stand in a line of standard input"
    require(bool(first or sys.stdin.isatty()), "--question", "", rule, "")
    problems = itertools.chain(first, problems)
  return functools.partial(
    run, config, data, problems, temperature, num_answers
  )


def run(
  config: Config,
  data: dataset.Dataset,
  problems: Iterable[records.Problem],
  temperature: float,
  num_answers: int,
) -> None:
  """Answers each problem when it comes.

  Raises:
    SettingError: A setting does not fit the devices or the weights.
  """
  with user_errors():
    count = jax.process_count()
    require(count == 1, "--num_processes", count, "be 1 to answer", "")
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    weights = load.resolve_weights(config.model.weights)
    model = dataclasses.replace(config.model, weights=weights)
    rollout = dataclasses.replace(
      config.rollout, chunk_tokens=1, pictures_per_shard=1
    )
    sampler = Sampler(model, rollout, mesh, data.tokenizer)
    params = load.load_params(model, mesh)
  options = {"temperature": temperature, "num_completions": num_answers}
  _, shards = sharding.data_shards(mesh)
  try:
    with jax.set_mesh(mesh):
      for problem in problems:
        prompts = data.make_prompts([problem], batch_size=shards)
        _answer(sampler, params, prompts, jax.random.key(config.seed), options)
  except BrokenPipeError:  # Whoever reads, as `head`, has read enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _answer(
  sampler: Sampler,
  params: dict,
  prompts: pipeline.Batch,
  key: jax.Array,
  options: dict[str, Any],
) -> None:
  """Writes answers to the first of the prompts, and logs their cost."""
  started = time.perf_counter()
  rows, shown = [list[int]()] * options["num_completions"], ""

  def write(ids: Mapping[int, list[list[int]]]) -> None:
    nonlocal rows, shown
    waiting.close()  # No log within the text.
    text = text_so_far(sampler.tokenizer.decode, ids[0], rows)
    new, rows, shown = text[len(shown) :], ids[0], text
    # A terminal must not obey what a model says.
    new = printable(new, keep="\n\t") if sys.stdout.isatty() else new
    print(new, end="", flush=True)

  with contextlib.ExitStack() as waiting:
    waiting.enter_context(activity.reporting())
    completions = sampler.sample(
      params, prompts, key, on_tokens=write, **options
    ).completions
  write({0: rows})
  stopped = sharding.local_rows(sampler.mesh, completions.stopped)[0]
  limit = sampler.settings.max_new_tokens
  cut = f"{(~stopped).sum()} of {len(rows)} cut off by rollout.max_new_tokens"
  logging.info(
    "%s tokens in %.1f s%s.",
    ", ".join(str(len(ids)) for ids in rows),
    time.perf_counter() - started,
    "" if stopped.all() else f"; {cut} ({limit})",
  )


def text_so_far(
  decode: Callable[[list[int]], str],
  rows: Sequence[list[int]],
  rows_before: Sequence[list[int]],
) -> str:
  """The text of completions up to the first one that has not ended.

  Such a one has more tokens in `rows` than before.
  """
  text = ""
  for number, (ids, before) in enumerate(zip(rows, rows_before, strict=True)):
    text += f"[{number + 1}] " if len(rows) > 1 else ""
    text += decode(ids)
    if len(ids) > len(before):
      # More bytes may change the last character.
      count = len(text) - len(text.rstrip(_INCOMPLETE))
      return text[: len(text) - min(count, _MOST_INCOMPLETE)]
    text += "\n"
  return text


def _read_questions(
  data: dataset.Dataset, pictures: list[bytes]
) -> Iterator[records.Problem]:
  """The questions that a person types, each with the pictures shown then.

  The pictures stay for the next question, until others are named.

  Raises:
    SettingError: A line cannot be used, and nobody is at a terminal.
  """
  logging.info(_HELP)
  is_asked = False
  for line in _read_lines():
    command, _, file = line.strip().partition(" ")
    try:
      if command != "/image":
        yield data.make_question(line, pictures)
        is_asked = True
        continue
      added = [_read_picture(file)] if file else []
      pictures = [*pictures, *added] if added and not is_asked else added
      is_asked = False
      logging.info("Pictures with the next question: %d", len(pictures))
    except ValueError as error:
      if not sys.stdin.isatty():
        raise SettingError(str(error)) from error
      logging.error("%s", error)


def _read_lines() -> Iterator[str]:
  """The lines of standard input up to an empty one; a person can edit them."""
  prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
  if prompt:
    importlib.import_module("readline")  # Changes `input`.
  editing = interrupt.editing if prompt else contextlib.nullcontext
  with contextlib.suppress(EOFError):
    while True:
      with user_errors(), editing():
        line = input(prompt)
      if not line.strip():
        return
      yield line


def _read_picture(file: str) -> bytes:
  """The bytes of a picture that can be decoded."""
  path = to_path("--image", file)
  try:
    content = untrusted.read_bytes(path, images.MAX_BYTES)
    images.decode(content)
  except (OSError, ValueError) as error:
    reason = printable(getattr(error, "detail", str(error)).rstrip("."))
    rule = f"be the file of a picture: {reason}"
    raise ValueError(f"--image ({file!r}) must {rule}.") from error
  return content
