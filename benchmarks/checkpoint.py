"""Measures the cost of a checkpoint, and how long it blocks training.

`python benchmarks/checkpoint.py [--gib=1] [--repeats=5]` saves a state of
random float32 numbers in 16 leaves, as a run does. It prints a table, and the
same as one line of JSON. "blocks" is the time until `save` returns, and
"blocks, CPU" the CPU time of this process in it. Hashing for the manifest comes
later, and `verify` is a part of `restore`. On an accelerator "blocks" includes
the copy to the host.
"""

import json
import pathlib
import statistics
import tempfile
import time

import jax
from absl import app, flags
from etils import epath

from configs import base
from grpo_tpu.checkpoint import checkpointer, manifest
from grpo_tpu.checkpoint.settings import CheckpointConfig

_GIB = flags.DEFINE_float("gib", 1.0, "Size of the state.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Number of saves.")
_LEAVES = 16


def measure(folder: pathlib.Path, gib: float, repeats: int) -> dict:
  """Measures the seconds of each part, one number per repeat."""
  size = int(gib * 2**30 / 4 / _LEAVES)
  keys = jax.random.split(jax.random.key(0), _LEAVES)
  state = {
    f"leaf{i}": jax.random.normal(key, (size,)) for i, key in enumerate(keys)
  }
  jax.block_until_ready(state)
  update = jax.jit(
    lambda tree: jax.tree.map(lambda x: x * 0.999, tree), donate_argnums=0
  )
  seconds = {"blocks": [], "blocks, CPU": [], "until durable": []}
  seconds |= {"hash": [], "verify": [], "restore": []}
  write = manifest.write

  def timed_write(*arguments):
    start = time.perf_counter()
    write(*arguments)
    seconds["hash"].append(time.perf_counter() - start)

  manifest.write = timed_write
  settings = CheckpointConfig(
    **base.get_config().checkpoint.to_dict() | {"every_steps": 1, "keep": 1}
  )
  with checkpointer.Checkpoints(folder, settings) as checkpoints:
    # The first save compiles the check for finite numbers.
    checkpoints.save(0, state, {})
    checkpoints.wait()
    seconds["hash"].clear()
    for step in range(1, repeats + 1):
      state = jax.block_until_ready(update(state))
      worked, start = time.process_time(), time.perf_counter()
      checkpoints.save(step, state, {})
      seconds["blocks"].append(time.perf_counter() - start)
      seconds["blocks, CPU"].append(time.process_time() - worked)
      state = jax.block_until_ready(update(state))
      checkpoints.wait()
      seconds["until durable"].append(time.perf_counter() - start)
      path = epath.Path(folder) / f"{step:08}"
      start = time.perf_counter()
      assert not manifest.find_damage(path)
      seconds["verify"].append(time.perf_counter() - start)
    for _ in range(repeats):
      start = time.perf_counter()
      restored = checkpoints.restore(state)
      assert restored is not None
      jax.block_until_ready(restored.state)
      seconds["restore"].append(time.perf_counter() - start)
      del restored
  return seconds


def main(argv: list[str]) -> None:
  """Measures, and prints the table and the JSON."""
  del argv
  with tempfile.TemporaryDirectory() as folder:
    seconds = measure(pathlib.Path(folder), _GIB.value, _REPEATS.value)
  print(f"{'seconds':15} {'median':>8} {'most':>8}")
  for name, each in seconds.items():
    print(f"{name:15} {statistics.median(each):8.3f} {max(each):8.3f}")
  medians = {name: statistics.median(each) for name, each in seconds.items()}
  print(
    json.dumps(
      {
        "gib": _GIB.value,
        "repeats": _REPEATS.value,
        "device": jax.devices()[0].device_kind,
        "median_seconds": medians,
        "most_seconds": {name: max(each) for name, each in seconds.items()},
      }
    )
  )


if __name__ == "__main__":
  app.run(main)
