"""Feeds damaged copies of a valid file to a reader, from a fixed seed.

Whatever a file holds, a reader must return or raise a ValueError or an OSError
(a SettingError is a ValueError), within limits of time and memory. Input number
`i` depends on the seed and `i` alone, so an error that names `i` can be
repeated with `damage(valid, i)`.
"""

import copy
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

# The default suite fuzzes a reader for a second, a nightly one for minutes.
both_durations = pytest.mark.parametrize(
  "seconds",
  [
    pytest.param(float(os.environ.get("FUZZ_SECONDS", 1)), id="short"),
    pytest.param(180.0, marks=pytest.mark.nightly, id="long"),
  ],
)
_DEPTH = 3000
_VALUES = (
  *(None, True, False, 0, 1, -1, 3, 2**31, 2**32 - 1, 2**40, 2**63, 10**400),
  *(0.5, -8.0, 1e308, float("nan"), float("inf"), "", "a", "1", "\ud800"),
  *("\x1b[2J\r", "../../etc/passwd", "/dev/zero", [], {}, [[]], [1], {"a": 1}),
)
_NUMBERS = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


class _TooSlow(BaseException):
  """A call took too long; no reader may catch this by accident."""


def fuzz(
  read: Callable[[bytes], object],
  valid: Sequence[bytes],
  seconds: float,
  *,
  allowed: tuple[type[Exception], ...] = (ValueError, OSError),
  call_seconds: float = 5.0,
  extra_bytes: int = 512 << 20,
) -> int:
  """Reads damaged copies for some seconds; returns how many.

  Args:
    read: Reads one input; raises `AssertionError` if it dislikes the result.
    valid: Contents of valid files, of which each input is a damaged copy.
    seconds: How long.
    allowed: The exceptions that refuse an input.
    call_seconds: The limit of a call, checked wherever Python code runs.
    extra_bytes: Address space that a call may add to that of the process.
  """
  for content in valid:
    read(content)
  end, number = time.monotonic() + seconds, 0
  while time.monotonic() < end:
    content = damage(valid, number)
    try:
      with _Limits(call_seconds, extra_bytes):
        read(content)
    except allowed:
      pass
    except BaseException as error:
      error.add_note(f"Input {number}: {content[:500]!r}")
      raise
    number += 1
  return number


def damage(valid: Sequence[bytes], number: int) -> bytes:
  """Input `number`: a valid content with a few changes."""
  rng = random.Random(number)
  content = rng.choice(valid)
  if rng.random() < 0.7:
    try:
      document = json.loads(content)
    except ValueError:
      pass
    else:
      for _ in range(rng.choice((1, 1, 1, 2, 4))):
        document = _damage_document(copy.deepcopy(document), rng)
      return _to_json(document)
  for _ in range(rng.choice((1, 1, 2, 4, 8))):
    content = _damage_bytes(content, rng)
  return content


def _damage_bytes(content: bytes, rng: random.Random) -> bytes:
  # Most formats have their header, and so their traps, at the start.
  limit = len(content) if rng.random() < 0.5 else min(len(content), 256)
  start = rng.randrange(limit + 1)
  stop = min(len(content), start + rng.choice((1, 2, 4, 8, 16, 64)))
  width = rng.choice((1, 2, 4, 8))
  number = (rng.choice(_NUMBERS) % 256**width).to_bytes(width, "little")
  middle = rng.choice(
    (
      number,  # Over what is there, below.
      rng.randbytes(stop - start),
      bytes(stop - start),
      b"",
      content[start:stop] * rng.choice((2, 3, 50)),
      rng.choice((b"[" * _DEPTH, b"\xff", b"\n", b'"', b"{}", b"9" * 400)),
    )
  )
  if middle is number:
    stop = start + width
  elif rng.random() < 0.1:
    stop = len(content)  # Cuts the rest off.
  return content[:start] + middle + content[stop:]


def _damage_document(document: Any, rng: random.Random) -> Any:
  """Replaces, removes, moves or nests one value of a JSON document."""
  places = [(None, None)]
  waiting = [document]
  while waiting:
    parent = waiting.pop()
    if isinstance(parent, dict | list):
      keys = parent if isinstance(parent, dict) else range(len(parent))
      places += [(parent, key) for key in list(keys)[:200]]
      waiting += [parent[key] for key in list(keys)[:200]]
  parent, key = rng.choice(places)
  old = document if parent is None else parent[key]
  action = rng.choice(("value", "value", "remove", "copy", "wrap", "nest"))
  other, other_key = rng.choice(places)
  new: Any = copy.deepcopy(rng.choice(_VALUES))
  if action == "copy" and other is not None:
    new = copy.deepcopy(other[other_key])
  elif action == "wrap":
    new = rng.choice(([old], {"a": old}, str(old)[:100], [old, old]))
  elif action == "nest":
    new = _Nested()
  if parent is None:
    return new
  if action == "remove":
    del parent[key]
  else:
    parent[key] = new
  return document


class _Nested:
  """Stands for lists in lists, which `json.dumps` could not write itself."""


def _to_json(document: Any) -> bytes:
  text = json.dumps(document, default=lambda _: "<nested>")
  text = text.replace('"<nested>"', "[" * _DEPTH + "]" * _DEPTH)
  return text.encode("utf-8")


class _Limits:
  """Ends the body with an exception beyond its seconds or its memory."""

  def __init__(self, seconds: float, extra_bytes: int):
    self._seconds, self._extra_bytes = seconds, extra_bytes

  def __enter__(self) -> None:
    self._old = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm", encoding="ascii") as file:
      size = int(file.read().split()[0]) * resource.getpagesize()
    limit = (size + self._extra_bytes, self._old[1])
    resource.setrlimit(resource.RLIMIT_AS, limit)
    self._handler = signal.signal(signal.SIGALRM, self._interrupt)
    signal.setitimer(signal.ITIMER_REAL, self._seconds)

  def __exit__(self, *_: object) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, self._handler)
    resource.setrlimit(resource.RLIMIT_AS, self._old)

  def _interrupt(self, *_: object) -> None:
    raise _TooSlow(f"more than {self._seconds} seconds")
