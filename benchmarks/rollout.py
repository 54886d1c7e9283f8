"""Compares a rollout with a long tail to one in which all rows are full.

    python benchmarks/rollout.py [--prompt_length=64 --completion_length=256]

Lengths are forced: nine of ten rows stop within a quarter of the maximum.
Prints a table of CPU seconds (medians of runs that take turns) and a line of
JSON.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import weights
from grpo_tpu.rollout import engine, generate

CONFIG = gemma3_config.ModelConfig(
  vocab_size=4096,
  num_layers=6,
  embed_dim=256,
  hidden_dim=1024,
  num_heads=4,
  num_kv_heads=1,
  head_dim=64,
  sliding_window=512,
  query_scale=64**-0.5,
  local_rope_base=10_000.0,
  global_rope_base=1_000_000.0,
  global_rope_factor=8.0,
  vision=None,
)


def parser(description: str | None) -> argparse.ArgumentParser:
  """The parser of the flags for the sizes of a rollout."""
  flags = argparse.ArgumentParser(description=description)
  for name, value in (
    ("prompts", 8),
    ("completions", 8),
    ("prompt_length", 64),
    ("completion_length", 256),
    ("chunk_tokens", 16),
    ("repeats", 5),
  ):
    flags.add_argument(f"--{name}", type=int, default=value)
  return flags


def long_tail(args: argparse.Namespace) -> np.ndarray:
  """Tokens of each row; one row in ten has full length."""
  rng = np.random.default_rng(0)
  rows = args.prompts * args.completions
  lengths = rng.integers(1, args.completion_length // 4 + 1, rows)
  lengths[rng.permutation(rows)[: round(rows / 10)]] = args.completion_length
  return lengths.reshape(args.prompts, args.completions)


def make(
  args: argparse.Namespace,
) -> tuple[dict, engine.Prompts, engine.Settings, Mesh]:
  """Makes parameters, prompts and sampling settings on a mesh."""
  mesh = sharding.make_mesh(1, len(jax.devices()), 1)
  params = jax.tree.map(
    jax.device_put,
    weights.random_params(CONFIG, 0, np.dtype(np.float32)),
    sharding.param_shardings(
      mesh, weights.abstract_params(CONFIG, jnp.float32)
    ),
  )
  ids = np.random.default_rng(1).integers(
    200, CONFIG.vocab_size, (args.prompts, args.prompt_length), dtype=np.int32
  )
  prompts = engine.Prompts(
    ids=ids,
    length=np.full(args.prompts, args.prompt_length, np.int32),
    images=np.zeros((args.prompts, 0, 0, 0, 3), np.uint8),
    index=np.arange(args.prompts, dtype=np.int32),
  )
  settings = engine.Settings(
    config=CONFIG,
    num_completions=args.completions,
    max_new_tokens=args.completion_length,
    min_new_tokens=args.completion_length,
    chunk_tokens=args.chunk_tokens,
    temperature=1.0,
    dtype=jnp.dtype(jnp.float32),
  )
  return params, sharding.device_put_batch(mesh, prompts), settings, mesh


def main() -> None:
  """Measures, and prints the table and the JSON."""
  args = parser(__doc__).parse_args()
  tail = long_tail(args)
  limits = {
    "all rows full": np.full_like(tail, args.completion_length),
    "long tail": tail,
  }
  params, prompts, settings, mesh = make(args)

  def run(limit):
    with jax.set_mesh(mesh):
      completions, report = generate.sample_completions(
        params,
        prompts,
        jax.random.key(0),
        settings=settings,
        mesh=mesh,
        row_limits=limit,
      )
    jax.block_until_ready(completions)
    return report

  for limit in limits.values():
    run(limit)  # The first run compiles.
  seconds = {name: [] for name in limits}
  for _ in range(args.repeats):
    for name, limit in limits.items():
      started = time.process_time()
      report = run(limit)
      seconds[name].append((time.process_time() - started, report))
  print(f"{'':24}{'CPU s':>8}{'min':>8}{'max':>8}{'live share':>12}")
  medians = []
  for name, runs in seconds.items():
    cpu = [x for x, _ in runs]
    report = runs[-1][1]
    medians.append(statistics.median(cpu))
    share = report.decoded / report.row_steps
    print(
      f"{name:24}{medians[-1]:8.2f}{min(cpu):8.2f}{max(cpu):8.2f}{share:12.2f}"
    )
  whole, tailed = medians
  print(
    json.dumps(
      {"full_cpu_s": whole, "tail_cpu_s": tailed, "ratio": tailed / whole}
    )
  )


if __name__ == "__main__":
  main()
