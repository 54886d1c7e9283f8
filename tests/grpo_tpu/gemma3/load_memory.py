"""What loading a checkpoint adds to this process's peak memory, as JSON."""

import json
import pathlib
import sys

import jax

from grpo_tpu.gemma3 import weights


def status(name: str) -> int:
  """A figure of /proc/self/status, in bytes."""
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  line = next(line for line in lines if line.startswith(f"{name}:"))
  return int(line.split()[1]) * 1024


def main() -> None:
  directory, warm_up = sys.argv[1:]
  # What JAX itself takes, once, is no part of it.
  jax.block_until_ready(weights.from_hf(warm_up))
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # Resets VmHWM.
  before = status("VmRSS")
  _, params = weights.from_hf(directory)
  jax.block_until_ready(params)
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
  added = status("VmHWM") - before - num_bytes
  print(json.dumps({"params": num_bytes, "added": added}))


if __name__ == "__main__":
  main()
