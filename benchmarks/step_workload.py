"""Sizes, prompts and protocol that the runners of `grpo_step.py` share.

It runs in the project's Python and in the peers', so it imports neither. A text
is its ids as words, so that every model reads the same ids with any tokenizer.
"""

import argparse
import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

PAD, EOS, BOS = 0, 1, 2
END_OF_TURN = 106  # Our second stop id.
FIRST_WORD = 200

T = TypeVar("T")

# Layers, width, hidden width, query heads, key-value heads, head size,
# vocabulary, window; prompts, completions per prompt; prompts per microbatch of
# the peers and of ours, tokens per chunk of our logits. At 270M a microbatch is
# one prompt, because all logits of a step would take gigabytes.
PRESETS = {
  "tiny": (6, 256, 1024, 4, 1, 64, 4096, 64, 8, 8, 8, 8, 4096),
  "270m": (18, 640, 2048, 4, 1, 256, 262_144, 512, 4, 4, 1, 1, 1024),
}
_NAMES = (
  *("layers", "width", "ffn", "heads", "kv_heads", "head_dim", "vocab"),
  *("window", "prompts", "num_generations", "micro_prompts"),
  *("our_micro_prompts", "logits_chunk"),
)


def parser(description: str) -> argparse.ArgumentParser:
  """The parser of the flags; `parse` fills in those not given."""
  flags = argparse.ArgumentParser(description=description)
  flags.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
  for name in _NAMES:
    flags.add_argument(
      f"--{name}", type=int, help="replaces the preset's value"
    )
  flags.add_argument("--prompt_length", type=int, default=64)
  flags.add_argument("--completion_length", type=int, default=64)
  flags.add_argument(
    "--steps", type=int, default=7, help="timed, after warm-up"
  )
  flags.add_argument("--warmup", type=int, default=2)
  flags.add_argument("--learning_rate", type=float, default=1e-5)
  flags.add_argument("--beta", type=float, default=0.04)
  flags.add_argument("--seed", type=int, default=0)
  flags.add_argument(
    "--torch_threads",
    type=int,
    default=1,
    help="more threads spin while they wait, which costs CPU-seconds",
  )
  flags.add_argument("--remat", default="dots", help="our model.remat")
  return flags


def parse(flags: argparse.ArgumentParser) -> argparse.Namespace:
  """The command line, with the preset's sizes as defaults."""
  args = flags.parse_args()
  for name, value in zip(_NAMES, PRESETS[args.preset], strict=True):
    if getattr(args, name) is None:
      setattr(args, name, value)
  return args


def prompts(args: argparse.Namespace) -> list[list[list[int]]]:
  """Ids of the prompts of each step, BOS first.

  A prompt has between half of `prompt_length` and all of it. One prompt of each
  step has all, so that every trainer pads to the same length.
  """
  rng = random.Random(args.seed)

  def prompt(length):
    words = range(FIRST_WORD, args.vocab)
    return [BOS, *rng.choices(words, k=length - 1)]

  def lengths():
    half = args.prompt_length // 2
    some = [rng.randint(half, args.prompt_length) for _ in range(args.prompts)]
    return [args.prompt_length, *some[1:]]

  return [
    [prompt(length) for length in lengths()]
    for _ in range(args.warmup + args.steps)
  ]


def text(ids: list[int]) -> str:
  """The ids as words."""
  return " ".join(str(i) for i in ids)


def ids(words: str) -> list[int]:
  """The ids of a text."""
  return [int(word) for word in words.split()]


def reward(completion: str) -> float:
  """The share of even ids: a dense reward, equal for all trainers."""
  words = completion.split()
  return sum(int(word) % 2 == 0 for word in words) / max(1, len(words))


def rewards(completions: list[str], problems: list[Any]) -> list[float]:
  """`reward` with the signature of this project."""
  del problems
  return [reward(completion) for completion in completions]


class Runner:
  """A child's end of the pipe, with one step for each line of input."""

  def __init__(self):
    """Keeps stdout for the parent, and sends other output to stderr."""
    self._out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    self._phases: dict[str, float] = {}
    self._start = (0.0, 0.0)
    self.steps = 0

  def wait(self) -> None:
    """Waits for the next step; ends the process if there is none."""
    if not sys.stdin.readline():
      peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      self._report({"peak_gib": peak * _RSS_UNIT / 2**30})
      os._exit(0)  # Otherwise the trainer would save a checkpoint.
    self._start = (time.perf_counter(), time.process_time())

  def done(self, **facts: Any) -> None:
    """Reports the costs of the step.

    Args:
      **facts: Other values for the parent.
    """
    wall, cpu = (
      now - then
      for now, then in zip(
        (time.perf_counter(), time.process_time()), self._start, strict=True
      )
    )
    self._report({"wall": wall, "cpu": cpu, "phases": self._phases, **facts})
    self._phases = {}
    self.steps += 1

  def time_phase(
    self,
    name: str,
    function: Callable[..., T],
    ready: Callable[[T], Any] = lambda _: None,
  ) -> Callable[..., T]:
    """Wraps a function to count its CPU-seconds under a phase.

    Args:
      name: The phase.
      function: The function.
      ready: Waits until the function's result is ready.
    """

    def wrapper(*args, **kwargs):
      start = time.process_time()
      value = function(*args, **kwargs)
      ready(value)
      spent = time.process_time() - start
      self._phases[name] = self._phases.get(name, 0.0) + spent
      return value

    return wrapper

  def _report(self, facts: dict[str, Any]) -> None:
    self._out.write(json.dumps(facts) + "\n")
    self._out.flush()


# Kilobytes, but bytes on macOS.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def repeat(batches: list[T]) -> Iterator[T]:
  """The batches, then the last one forever, for loops that read ahead."""
  yield from batches
  while True:
    yield batches[-1]
