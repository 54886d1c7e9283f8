"""Compares loading a checkpoint from a bucket with only reading its bytes.

  python benchmarks/load_bucket.py FOLDER [GIGABYTES] [ROUNDS]

writes a checkpoint of 1 GB into the folder and puts it into the fake bucket of
the tests, a process of its own. Prints MB/s and seconds of CPU time, medians of
the rounds, which alternate: TensorStore's reading of the file by ranges, our
loading from the bucket, our loading from the disk. The second should be half as
fast as the first, or more.
"""

import collections
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import time

# A script finds the packages of its own checkout only by this.
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import tensorstore  # noqa: E402

from benchmarks import load_memory  # noqa: E402
from grpo_tpu.models.gemma3 import weights  # noqa: E402
from grpo_tpu.models.gemma3.convert import blocks  # noqa: E402
from tests.grpo_tpu.models.gemma3 import one_device  # noqa: E402

THERE = "gs://some-weights/model"


def read_ranges(store, name: str, size: int) -> None:
  """Reads an object by ranges, as many ahead as loading does."""
  waiting = collections.deque()
  for start in range(0, size, blocks._BLOCK_BYTES):
    stop = min(start + blocks._BLOCK_BYTES, size)
    waiting.append(store.read(name, byte_range=slice(start, stop)))
    if len(waiting) * blocks._BLOCK_BYTES >= blocks._AHEAD_BYTES:
      _ = waiting.popleft().result().value
  for future in waiting:
    _ = future.result().value


def main(folder: str, gigabytes: str = "1.0", rounds: str = "5") -> None:
  """Writes, measures and prints."""
  config = load_memory.config_of_size(float(gigabytes) * 1e9, "bfloat16")
  if not (pathlib.Path(folder) / "config.json").exists():
    load_memory.write(config, folder, "bfloat16")
  (file,) = pathlib.Path(folder).glob("*.safetensors")
  size = file.stat().st_size
  store = tensorstore.KvStore.open(f"{THERE}/").result()
  for path in pathlib.Path(folder).iterdir():
    store.write(path.name, path.read_bytes()).result()
  abstract = weights.abstract_params(config, jnp.dtype("bfloat16"))
  abstract = one_device.on_one_device(abstract)

  def load(path: str) -> None:
    opened = weights.open_files("hf", config, path)
    jax.block_until_ready(opened.load(abstract))

  ways = {
    "ranges": lambda: read_ranges(store, file.name, size),
    "bucket": lambda: load(THERE),
    "disk": lambda: load(folder),
  }
  found = {name: [] for name in ways}
  load(folder)  # Compiles.
  for _ in range(int(rounds)):
    for name, way in ways.items():
      start, cpu = time.perf_counter(), time.process_time()
      way()
      seconds = time.perf_counter() - start
      found[name].append((seconds, time.process_time() - cpu))
  speed = {}
  for name, pairs in found.items():
    seconds, cpu = map(statistics.median, zip(*pairs, strict=True))
    speed[name] = size / seconds / 1e6
    print(f"{name}: {speed[name]:.0f} MB/s, {cpu:.2f} s of CPU time")
  print(f"bucket / ranges: {speed['bucket'] / speed['ranges']:.2f}")


if __name__ == "__main__":
  command = [sys.executable, "-m", "tests.gcs.fake"]
  fake = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
  try:
    for line in fake.stdout or ():
      name, _, value = line.removeprefix("export ").strip().partition("=")
      os.environ[name] = shlex.split(value)[0]
      if name == "STORAGE_EMULATOR_HOST":
        break
    main(*sys.argv[1:])
  finally:
    fake.kill()
