"""Prepares N records of 480 x 320 JPEG, and prints speed and memory.

    python benchmarks/prepare.py --records=20000

The pictures are drawn first, into parquet shards under --folder. Then the
command runs as a process. The resident memory of it and of all processes below
it is sampled; each quarter of the time has its largest sum. Memory that
processes share is counted in each of them.
"""

import argparse
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

_SHARD = 2_000


def draw(index: int) -> bytes:
  """A JPEG of 480 x 320, some 25 kB, that differs from all others."""
  rng = np.random.default_rng(index)
  coarse = rng.integers(0, 256, (40, 60, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(coarse).resize((480, 320)).save(file, "JPEG", quality=85)
  return file.getvalue()


def write_source(folder: pathlib.Path, count: int) -> None:
  """Writes parquet shards of numbered questions."""
  shards = range(0, count, _SHARD)
  for shard, start in enumerate(shards):
    rows = [
      {
        "question": f"Which number has picture {i}?",
        "answer": str(i),
        "image": {"bytes": draw(i), "path": None},
      }
      for i in range(start, min(count, start + _SHARD))
    ]
    name = f"train-{shard:05d}-of-{len(shards):05d}.parquet"
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, folder / name, row_group_size=100)


def sample(root: int, seconds: dict[int, float]) -> int:
  """The resident bytes of a process and of all below it.

  Updates the CPU-seconds of each of them.
  """
  parents, sizes, cpu = {}, {}, {}
  for entry in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      stat = (entry / "stat").read_text().rpartition(")")[2].split()
      pages = int((entry / "statm").read_text().split()[1])
    except OSError:
      continue
    pid = int(entry.name)
    parents[pid] = int(stat[1])
    sizes[pid] = pages * os.sysconf("SC_PAGESIZE")
    cpu[pid] = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
  tree = {root}
  while more := {p for p, up in parents.items() if up in tree} - tree:
    tree |= more
  seconds |= {pid: cpu[pid] for pid in tree & cpu.keys()}
  return sum(sizes.get(pid, 0) for pid in tree)


def run(source: pathlib.Path, data_dir: pathlib.Path, count: int) -> None:
  """Runs the command, and prints what it took."""
  command = [sys.executable, "-m", "data_pipelines.prepare"]
  command += [f"--source={source}", f"--data_dir={data_dir}"]
  start = time.monotonic()
  samples: list[int] = []
  cpu: dict[int, float] = {}
  with subprocess.Popen(command) as process:
    while process.poll() is None:
      samples.append(sample(process.pid, cpu))
      time.sleep(0.25)
  seconds, spent = time.monotonic() - start, sum(cpu.values())
  if process.returncode:
    raise SystemExit(process.returncode)
  quarters = np.array_split(np.array(samples) / 2**20, 4)
  peaks = ", ".join(f"{quarter.max():.0f}" for quarter in quarters)
  print(f"{count} records: {seconds:.0f} s, {count / seconds:.0f} records/s")
  print(f"{spent:.0f} CPU-seconds, {1000 * spent / count:.2f} CPU-ms a record")
  print(f"largest resident memory in each quarter: {peaks} MiB")


def main() -> None:
  """Draws, unless the folder holds the pictures already, and prepares."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--records", type=int, default=20_000)
  parser.add_argument("--folder", default="")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as scratch:
    source = pathlib.Path(arguments.folder or scratch) / "source"
    if not source.is_dir():
      source.mkdir(parents=True)
      write_source(source, arguments.records)
    run(source, pathlib.Path(scratch) / "data", arguments.records)


if __name__ == "__main__":
  main()
