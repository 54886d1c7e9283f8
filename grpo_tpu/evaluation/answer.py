"""Answers a person's questions, for --mode=answer; writes no file.

Text alone goes to standard output, as its tokens come; the rest is log.
"""

import dataclasses
import functools
import importlib
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
from absl import logging

from data_pipelines import dataset, images, pipeline, records
from data_pipelines.text import untrusted
from data_pipelines.validation import printable, require, to_path, user_errors
from grpo_tpu.checkpoint import load
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import interrupt, sharding
from grpo_tpu.rollout.sampler import Sampler

_MAX_SAMPLES = 1000
# An incomplete character is decoded as up to three of these.
_INCOMPLETE, _MOST_INCOMPLETE = "\N{REPLACEMENT CHARACTER}", 3
_HELP = (
  "Type a question. Each is answered on its own, without those before it. "
  "/image FILE shows a picture with it, /image shows none; an empty line ends."
)


def open_answers(
  config: Config,
  *,
  question: str | None,
  image_files: Sequence[str],
  temperature: float,
  num_samples: int,
) -> Callable[[], str]:
  """Checks the flags and the first question; returns what answers them all.

  Raises:
    ValueError: A flag is wrong, or the model cannot be asked this.
  """
  rule = "be at least 0 and finite"
  is_divisor = 0 <= temperature < math.inf
  require(is_divisor, "--temperature", temperature, rule, "give 0 or 1")
  rule = f"be at least 1 and at most {_MAX_SAMPLES}"
  is_number = 1 <= num_samples <= _MAX_SAMPLES
  require(is_number, "--samples", num_samples, rule, "give 1")
  pictures = [_read_picture(file) for file in image_files]
  data = dataset.open_prompts(
    config.data, config.model_inputs, seed=config.seed
  )
  if question is None:
    problems = read_problems(data, pictures)
    first = list(itertools.islice(problems, 1))
    rule = "be given, or stand in a line of standard input"
    require(bool(first or sys.stdin.isatty()), "--question", "", rule, "")
    problems = itertools.chain(first, problems)
  else:
    problems = [_make_problem(data, question, pictures)]
  return functools.partial(
    run, config, data, problems, temperature, num_samples
  )


def run(
  config: Config,
  data: dataset.Dataset,
  problems: Iterable[records.Problem],
  temperature: float,
  num_samples: int,
) -> str:
  """Answers each problem when it comes.

  Raises:
    SettingError: A setting does not fit the devices or the weights, or a
      problem cannot be asked.
  """
  with user_errors():
    count = jax.process_count()
    rule = "be on one process"
    require(count == 1, "--mode=answer", f"{count} processes", rule, "")
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    weights = load.resolve_weights(config.model.weights)
    model = dataclasses.replace(config.model, weights=weights)
    rollout = dataclasses.replace(
      config.rollout, chunk_tokens=1, pictures_per_shard=1
    )
    sampler = Sampler(model, rollout, mesh, data.tokenizer)
    params = load.load_params(model, mesh)
    _, shards = sharding.data_shards(mesh)
  ask = functools.partial(
    _answer, sampler, params, num_samples, temperature, config.seed
  )
  try:
    with jax.set_mesh(mesh), user_errors():
      for problem in problems:
        ask(data.make_prompts([problem], batch_size=shards))
  except BrokenPipeError:  # Whoever reads, as `head`, has read enough.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return ""


def _answer(
  sampler: Sampler,
  params: dict,
  num_samples: int,
  temperature: float,
  seed: int,
  prompts: pipeline.Batch,
) -> None:
  """Writes the answers to the first of the prompts, and logs their cost."""
  started = time.perf_counter()
  stream = TextStream(sampler.tokenizer.decode, num_samples)
  completions = sampler.sample(
    params,
    prompts,
    jax.random.key(seed),
    num_completions=num_samples,
    temperature=temperature,
    on_tokens=lambda ids: _write(stream.new_text(ids[0])),
  ).completions
  _write(stream.rest())
  mask, stopped = sharding.local_rows(
    sampler.mesh, (completions.mask, completions.stopped)
  )
  cut = num_samples - int(stopped[0].sum())
  share = f"{cut} of {num_samples} " if num_samples > 1 else ""
  limit = sampler.settings.max_new_tokens
  logging.info(
    "%s tokens in %.1f s%s.",
    ", ".join(map(str, mask[0].sum(axis=-1))),
    time.perf_counter() - started,
    f"; {share}cut off by rollout.max_new_tokens ({limit})" if cut else "",
  )


def _write(text: str) -> None:
  """Writes to standard output; a terminal must not obey what a model says."""
  is_terminal = sys.stdout.isatty()
  sys.stdout.write(printable(text, keep="\n\t") if is_terminal else text)
  sys.stdout.flush()


class TextStream:
  """The text of completions, one after the other, as their tokens come.

  A completion that ended while another one was shown comes whole.
  """

  def __init__(self, decode: Callable[[list[int]], str], num_completions: int):
    """Has no text yet."""
    self._decode = decode
    self._rows: list[list[int]] = [[] for _ in range(num_completions)]
    self._number, self._shown = 0, ""  # Of the completion that is shown.

  def new_text(self, rows: list[list[int]], *, is_over: bool = False) -> str:
    """What is new in the token ids so far of the completions.

    Every completion that has not ended must have grown since the last call.
    """
    before, self._rows = self._rows, rows
    new = ""
    while self._number < len(rows):
      ids = rows[self._number]
      has_ended = is_over or len(ids) == len(before[self._number])
      text = self._decode(ids)
      if len(rows) > 1:
        text = f"[{self._number + 1}] {text}"
      text = f"{text}\n" if has_ended else complete_characters(text)
      new += text[len(self._shown) :]
      self._shown = text
      if not has_ended:
        break
      self._number, self._shown = self._number + 1, ""
    return new

  def rest(self) -> str:
    """What is left of the text after the last tokens."""
    return self.new_text(self._rows, is_over=True)


def complete_characters(text: str) -> str:
  """The text without what more bytes of its last character may change."""
  num_incomplete = len(text) - len(text.rstrip(_INCOMPLETE))
  return text[: len(text) - min(num_incomplete, _MOST_INCOMPLETE)]


def read_problems(
  data: dataset.Dataset, pictures: list[bytes]
) -> Iterator[records.Problem]:
  """The questions that a person types, each with the pictures shown then.

  They stay for the next question, until other ones are named.

  Raises:
    ValueError: A line cannot be used, and does not come from a terminal, where
      its person is told.
  """
  logging.info(_HELP)
  is_asked = False
  for line in _read_lines():
    command, _, file = line.strip().partition(" ")
    try:
      if command != "/image":
        problem = _make_problem(data, line, pictures)
      else:
        added = [_read_picture(file)] if file else []
        pictures = [*pictures, *added] if added and not is_asked else added
        is_asked = False
        logging.info("The next question shows %d pictures.", len(pictures))
        continue
    except ValueError as error:
      if not sys.stdin.isatty():
        raise
      logging.error("%s", error)
    else:
      yield problem
      is_asked = True


def _read_lines() -> Iterator[str]:
  """The lines of standard input up to an empty one, which a person can edit."""
  is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
  if is_terminal:
    importlib.import_module("readline")  # Changes `input`.
  while True:
    try:
      with interrupt.raising():
        line = input("> " if is_terminal else "")
    except EOFError:
      return
    except KeyboardInterrupt:
      interrupt.leave()
    if not line.strip():
      return
    yield line


def _make_problem(
  data: dataset.Dataset, question: str, pictures: Sequence[bytes]
) -> records.Problem:
  problem = records.make_question(question, pictures)
  try:
    data.check_prompt(problem)
  except records.BadRecord as error:
    raise ValueError(
      f"--question ({untrusted.shorten(question)}) must be one that the model "
      f"can be asked, but {error.detail}."
    ) from error
  return problem


def _read_picture(file: str) -> bytes:
  """The bytes of a picture that can be decoded."""
  path = to_path("--image", file)
  try:
    content = untrusted.read_bytes(path, images.MAX_BYTES)
    images.decode(content)
  except (OSError, ValueError) as error:
    reason = getattr(error, "detail", str(error)).rstrip(".")
    raise ValueError(
      f"--image ({file!r}) must be the file of a picture: {printable(reason)}."
    ) from error
  return content
