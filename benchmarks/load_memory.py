"""Measures how much loading a checkpoint adds to the peak of host memory.

The parameters themselves, which are in host memory on a CPU, do not count:

  python benchmarks/load_memory.py FOLDER [GIGABYTES]

writes checkpoints of 1 GB or more into the folder, in fp32 and bf16, and loads
each in a process of its own. Prints the added memory as a multiple of the
largest tensor in the file; the aim is below 1.3.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

# A script finds the packages of its own checkout only by this.
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from grpo_tpu.models.gemma3 import config as gemma3_config  # noqa: E402
from grpo_tpu.models.gemma3 import leaves, weights  # noqa: E402
from grpo_tpu.models.gemma3.convert import huggingface  # noqa: E402
from tests.grpo_tpu.models.gemma3 import one_device  # noqa: E402

# Many layers, so that every tensor is small beside the whole.
LARGE = dataclasses.replace(
  gemma3_config.CONFIGS["gemma3_1b"], vocab_size=65_536, sliding_window=64
)
SMALL = dataclasses.replace(gemma3_config.CONFIGS["tiny"], vision=None)


def write(config: gemma3_config.ModelConfig, folder: str, dtype: str) -> None:
  """Writes a checkpoint of this model."""
  shapes = weights.abstract_params(config, jnp.dtype(dtype))
  ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
  huggingface.save(config, ones, folder, dtype=dtype)


def config_of_size(num_bytes: float, dtype: str) -> gemma3_config.ModelConfig:
  """The large model with enough layers for this many bytes."""

  def size(num_layers: int) -> int:
    config = dataclasses.replace(LARGE, num_layers=num_layers)
    shapes = weights.abstract_params(config, jnp.dtype(dtype))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))

  per_layer = size(2) - size(1)
  num_layers = int(-(-(num_bytes - size(1)) // per_layer)) + 1
  return dataclasses.replace(LARGE, num_layers=max(1, num_layers))


def status(name: str) -> int:
  """A value from /proc/self/status, in bytes."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  line = next(line for line in lines if line.startswith(f"{name}:"))
  return int(line.split()[1]) * 1024


def measure(folder: str, warm_up: str) -> None:
  """Prints as JSON how much loading adds to this process's peak."""
  # JAX's own memory is allocated now, and does not count.
  jax.block_until_ready(one_device.from_hf(warm_up))
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM.
  before = status("VmRSS")
  config, params = one_device.from_hf(folder)
  jax.block_until_ready(params)
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
  added = status("VmHWM") - before - num_bytes
  itemsize = params["embedder"]["input_embedding"].dtype.itemsize
  shapes = weights.abstract_params(config, jnp.dtype(jnp.float32))
  in_file = leaves.file_shapes(shapes, "huggingface").values()
  largest = max(map(math.prod, in_file))
  found = {"params": num_bytes, "added": added, "largest": largest * itemsize}
  print(json.dumps(found))


def main(folder: str, gigabytes: str = "1.0") -> None:
  """Writes, measures and prints both dtypes."""
  root = pathlib.Path(folder)
  for dtype in ("float32", "bfloat16"):
    large, small = root / dtype, root / f"small_{dtype}"
    write(config_of_size(float(gigabytes) * 1e9, dtype), str(large), dtype)
    write(SMALL, str(small), dtype)
    ran = subprocess.run(
      [sys.executable, __file__, "--measure", str(large), str(small)],
      check=True,
      stdout=subprocess.PIPE,
      text=True,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    found = json.loads(ran.stdout)
    print(
      f"{dtype}: {found['params'] / 1e9:.2f} GB of parameters, largest tensor "
      f"{found['largest'] / 1e6:.0f} MB; loading adds "
      f"{found['added'] / 1e6:.0f} MB, {found['added'] / found['largest']:.2f} "
      "of that"
    )


if __name__ == "__main__":
  if sys.argv[1] == "--measure":
    measure(*sys.argv[2:])
  else:
    main(*sys.argv[1:])
