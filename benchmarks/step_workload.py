"""What the three runners of `grpo_step.py` share: sizes, prompts, protocol.

For the project's Python and the peers', so it imports nothing of either. A text
is its ids in words: the same ids reach every model, and no tokenizer matters.
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
END_OF_TURN = 106  # Of ours, which stops there too.
FIRST_WORD = 200

T = TypeVar("T")

# Layers, width, hidden width, query heads, key-value heads, head size,
# vocabulary, window; prompts, completions of each; prompts per microbatch of
# the peers and of ours, tokens whose logits ours holds at a time. At 270M each
# takes a prompt at a time: all logits of a step at once are gigabytes.
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
  """Flags that say what a step is; `parsed` fills in those not given."""
  flags = argparse.ArgumentParser(description=description)
  flags.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
  for name in _NAMES:
    flags.add_argument(f"--{name}", type=int, help="instead of the preset's")
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
    help="threads that wait for a core spin, and pay CPU-seconds for it",
  )
  flags.add_argument("--remat", default="dots", help="ours: model.remat")
  return flags


def parsed(flags: argparse.ArgumentParser) -> argparse.Namespace:
  """The command line, with the preset's sizes where it says nothing."""
  args = flags.parse_args()
  for name, value in zip(_NAMES, PRESETS[args.preset], strict=True):
    if getattr(args, name) is None:
      setattr(args, name, value)
  return args


def prompts(args: argparse.Namespace) -> list[list[list[int]]]:
  """Ids of the prompts of each step, BOS first.

  They are between half and all of `prompt_length` long, and one of each step is
  just that: padding to the longest is then padding to the maximum.
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
  """Ids in words."""
  return " ".join(str(i) for i in ids)


def ids(words: str) -> list[int]:
  """The reverse of `text`."""
  return [int(word) for word in words.split()]


def reward(completion: str) -> float:
  """The share of even ids: dense, and the same for all."""
  words = completion.split()
  return sum(int(word) % 2 == 0 for word in words) / max(1, len(words))


def rewards(completions: list[str], problems: list[Any]) -> list[float]:
  """`reward` as the project calls one."""
  del problems
  return [reward(completion) for completion in completions]


class Runner:
  """A child's end of the pipe: one step for each line that comes in."""

  def __init__(self):
    """Keeps stdout for the parent; what libraries print goes to stderr."""
    self._out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    self._phases: dict[str, float] = {}
    self._start = (0.0, 0.0)
    self.steps = 0

  def wait(self) -> None:
    """Until the parent asks for a step; ends the process if there is none."""
    if not sys.stdin.readline():
      peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
      self._say({"peak_gib": peak * _RSS_UNIT / 2**30})
      os._exit(0)  # Trainers would go on to save what they have.
    self._start = (time.perf_counter(), time.process_time())

  def done(self, **facts: Any) -> None:
    """Says what the step took.

    Args:
      **facts: Anything else that the parent is to know of it.
    """
    wall, cpu = (
      now - then
      for now, then in zip(
        (time.perf_counter(), time.process_time()), self._start, strict=True
      )
    )
    self._say({"wall": wall, "cpu": cpu, "phases": self._phases, **facts})
    self._phases = {}
    self.steps += 1

  def timed(
    self,
    name: str,
    function: Callable[..., T],
    ready: Callable[[T], Any] = lambda _: None,
  ) -> Callable[..., T]:
    """The function, its CPU-seconds counted under a phase.

    Args:
      name: Of the phase.
      function: Any.
      ready: Waits for what it gives.
    """

    def wrapper(*args, **kwargs):
      start = time.process_time()
      value = function(*args, **kwargs)
      ready(value)
      spent = time.process_time() - start
      self._phases[name] = self._phases.get(name, 0.0) + spent
      return value

    return wrapper

  def _say(self, facts: dict[str, Any]) -> None:
    self._out.write(json.dumps(facts) + "\n")
    self._out.flush()


# Kilobytes, but bytes on macOS.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def repeated(batches: list[T]) -> Iterator[T]:
  """The batches, and the last one for ever: loops that read ahead."""
  yield from batches
  while True:
    yield batches[-1]
