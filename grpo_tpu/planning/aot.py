"""Compiles for a slice that is not there, as far as the memory is known.

The compiler writes what it assigned to buffers before it generates code, which
takes many times as long. A thread compiles, and the process is to end as soon
as the files are there, so a process compiles one program. Knows none of ours.
"""

import dataclasses
import math
import pathlib
import re
import threading
import time
from typing import Any

# What says to libtpu that there is no TPU, no metadata server to ask, and no
# harm in other processes that load it too.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

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
_SCATTERED = re.compile(r"\s*%?all-reduce-scatter")
_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2}


@dataclasses.dataclass(frozen=True)
class Collective:
  """One kind of collective in a compiled program.

  Attributes:
    name: Of the operation.
    dtype: Of its result, as XLA names it.
    shape: Of its result.
    count: Times that it stands in the text, whatever the loops around it.
  """

  name: str
  dtype: str
  shape: tuple[int, ...]
  count: int

  @property
  def num_bytes(self) -> int:
    """Of one result."""
    return math.prod(self.shape) * _ITEM_BYTES.get(self.dtype, 4)


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What is known of a program before code is generated.

  Attributes:
    hbm_bytes: Of one device, arguments and temporaries.
    collectives: Those that its text shows.
  """

  hbm_bytes: int
  collectives: tuple[Collective, ...]


def compile_buffers(lowered: Any, folder: pathlib.Path) -> Compiled:
  """Compiles until buffers are assigned; the process must end soon after.

  Args:
    lowered: Of a jitted function, for the devices of a described topology.
    folder: New, for what the compiler writes.

  Raises:
    Exception: What the compiler raises, but for a program that does not fit.
  """
  failures: list[Exception] = []

  def compile_all():
    try:
      lowered.compile(compiler_options={"xla_dump_to": str(folder)})
    except Exception as error:
      failures.append(error)

  # The thread is left where it is: nothing can stop it but the process's end.
  thread = threading.Thread(target=compile_all, daemon=True)
  thread.start()
  is_over, hbm_bytes, text = False, None, ""
  # Once more after the end. What is there may be written anew at any time.
  while not (is_over or (hbm_bytes and text)):
    is_over = not thread.is_alive()
    hbm_bytes, text = _assigned(folder), _text(folder)
    time.sleep(0.0 if is_over else 0.1)
  return Compiled(hbm_bytes or _needed(failures), collectives(text))


def _assigned(folder: pathlib.Path) -> int | None:
  """Bytes of the largest report in a folder, once it is whole."""
  found = [
    int(match[1])
    for path in folder.glob(_REPORT)
    if (match := _DEFAULT_SPACE.search(path.read_text()))
  ]
  return max(found, default=None)


def _text(folder: pathlib.Path) -> str:
  """The optimized program, once it is whole."""
  for path in folder.glob(_HLO):
    with path.open("rb") as file:
      file.seek(max(0, path.stat().st_size - 64))
      if file.read().rstrip().endswith(b"}"):
        return path.read_text()
  return ""


def _needed(failures: list[Exception]) -> int:
  """Bytes that the compiler says that a program would have needed."""
  for error in failures:
    if match := _TOO_BIG.search(str(error)):
      return int(float(match[1]) * _UNITS[match[2]])
  raise failures[0] if failures else RuntimeError("nothing was compiled")


def collectives(hlo: str) -> tuple[Collective, ...]:
  """The collectives of an optimized program's text, the largest first."""
  counts: dict[tuple[str, str, tuple[int, ...]], int] = {}
  computation = ""
  for line in hlo.splitlines():
    if line.endswith("{"):
      computation = line
    if match := _COLLECTIVE.search(line):
      dtype, dims, name = match.groups()
      # TPUs spell it so: a sum that is cut where it is made.
      if name == "all-reduce" and _SCATTERED.match(computation):
        name = "reduce-scatter"
      key = name, dtype, tuple(int(x) for x in dims.split(",") if x)
      counts[key] = counts.get(key, 0) + 1
  found = [Collective(*key, count) for key, count in counts.items()]
  return tuple(sorted(found, key=lambda x: -x.num_bytes))
