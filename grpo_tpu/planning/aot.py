"""Compiles a program for a described slice until its memory is known.

The compiler writes its buffer assignment before it generates code, which takes
many times as long. A thread compiles, and the process must end as soon as the
files exist, so one process compiles one program.
"""

import collections
import dataclasses
import math
import pathlib
import re
import threading
import time
from typing import Any

from data_pipelines.text import tables

ENVIRONMENT: dict[str, str] = tables.read(__package__, "aot.toml")
_REPORT = "*memory-usage-report.txt"
_HLO = "*after_optimizations.txt"
_DEFAULT_SPACE = re.compile(
  r"Memory Space: default \(color=0\)\s+Total bytes: (\d+)"
)
_TOO_BIG = re.compile(
  r"total memory required[^(]*\(([\d.]+)([KMGT]?)\) exceeds"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_COLLECTIVE = re.compile(
  r"= \(?(\w+)\[([\d,]*)\][^=]*? "
  r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
  r"(?:-start)?\("
)
_REDUCE_SCATTER = re.compile(r"\s*%?all-reduce-scatter")
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
  """Equal collectives in a compiled program, with the result's dtype and shape.

  Trips of loops do not count: `count` is the number of occurrences in the text.
  """

  name: str
  dtype: str  # XLA's name, as in "bf16".
  shape: tuple[int, ...]
  count: int

  @property
  def num_bytes(self) -> int:
    """Bytes of one result."""
    return math.prod(self.shape) * _ITEM_BYTES.get(self.dtype, 4)


def compile_buffers(
  lowered: Any, folder: pathlib.Path
) -> tuple[int, list[Collective]]:
  """Compiles until buffers are assigned; the process must end soon after.

  Returns bytes of one device, for arguments and temporaries, and the
  collectives in the program's text. The compiler's files go to a new folder.

  Raises:
    Exception: The compiler's, unless the program only needs too much memory.
  """
  failures: list[Exception] = []

  def compile_all():
    try:
      lowered.compile(compiler_options={"xla_dump_to": str(folder)})
    except Exception as error:
      failures.append(error)

  # Nothing but the end of the process can stop this thread.
  thread = threading.Thread(target=compile_all, daemon=True)
  thread.start()
  is_over, hbm_bytes, text = False, None, ""
  # Reads once more after the end: the compiler may rewrite its files.
  while not (is_over or (hbm_bytes and text)):
    is_over = not thread.is_alive()
    hbm_bytes, text = _assigned_bytes(folder), _optimized_hlo(folder)
    time.sleep(0.0 if is_over else 0.1)
  return hbm_bytes or _required_bytes(failures), collectives(text)


def _assigned_bytes(folder: pathlib.Path) -> int | None:
  """Bytes in the largest complete report; None without one."""
  sizes = [
    int(match[1])
    for path in folder.glob(_REPORT)
    if (match := _DEFAULT_SPACE.search(path.read_text()))
  ]
  return max(sizes, default=None)


def _optimized_hlo(folder: pathlib.Path) -> str:
  """The text of the optimized program; "" until the file is complete."""
  for path in folder.glob(_HLO):
    with path.open("rb") as file:
      file.seek(max(0, path.stat().st_size - 64))
      if file.read().rstrip().endswith(b"}"):
        return path.read_text()
  return ""


def _required_bytes(failures: list[Exception]) -> int:
  """Bytes that a program needs, from the compiler's out-of-memory error."""
  for error in failures:
    if match := _TOO_BIG.search(str(error)):
      return int(float(match[1]) * _UNITS[match[2]])
  raise failures[0] if failures else RuntimeError("nothing was compiled")


def collectives(hlo: str) -> list[Collective]:
  """The collectives in the text of an optimized program, largest first."""
  counts: collections.Counter[tuple[str, str, tuple[int, ...]]]
  counts = collections.Counter()
  computation = ""
  for line in hlo.splitlines():
    if line.endswith("{"):
      computation = line
    if match := _COLLECTIVE.search(line):
      dtype, dims, name = match.groups()
      # TPUs write a reduce-scatter as an all-reduce in a named computation.
      if name == "all-reduce" and _REDUCE_SCATTER.match(computation):
        name = "reduce-scatter"
      counts[name, dtype, tuple(int(x) for x in dims.split(",") if x)] += 1
  found = [Collective(*key, count) for key, count in counts.items()]
  return sorted(found, key=lambda x: -x.num_bytes)
