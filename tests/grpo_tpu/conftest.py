"""A tiny model with prompts for it, and file systems to be made full."""

import dataclasses
import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from data_pipelines.text.chat_format import GEMMA3
from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import weights
from grpo_tpu.rollout import engine, generate


@dataclasses.dataclass(frozen=True)
class Tiny:
  """A tiny model: short windows, a global layer, one key-value head."""

  config: gemma3_config.ModelConfig
  params: dict

  def prompts(
    self, num_prompts: int, *, seed: int = 0, num_images: int = 1
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ids, lengths and images of different prompts of mixed lengths."""
    rng = np.random.default_rng(seed)
    vision = self.config.vision
    assert vision is not None
    block = [108, *[GEMMA3.image_placeholder] * vision.soft_tokens, 108]
    ids = np.zeros((num_prompts, 14), np.int32)
    lengths = rng.integers(10, 15, num_prompts)
    lengths[:2] = 14, 10
    for row, length in zip(ids, lengths, strict=True):
      head = [GEMMA3.bos, *block * num_images]
      words = rng.integers(110, self.config.vocab_size, length - len(head))
      row[:length] = [*head, *words]
    side = vision.image_size
    shape = (num_prompts, num_images, side, side, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    return jnp.asarray(ids), jnp.asarray(lengths), jnp.asarray(images)

  def mixed_prompts(
    self, counts: Sequence[int], *, seed: int = 0
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Prompts of `counts` images each, between words, with noise in no slot.

    A row's ids, length and images depend on its index, its count and the seed
    alone. What a slot without an image holds is black.
    """
    vision = self.config.vision
    assert vision is not None
    block = [108, *[GEMMA3.image_placeholder] * vision.soft_tokens, 108]
    rows, slots, side = [], max(counts), vision.image_size
    images = np.zeros((len(counts), slots, side, side, 3), np.uint8)
    for number, count in enumerate(counts):
      rng = np.random.default_rng([seed, number])
      words = rng.integers(110, self.config.vocab_size, (count + 1, 3))
      row = [GEMMA3.bos, *words[0, : 1 + number % 3]]
      for each in words[1:]:
        row += [*block, *each]
      rows.append(row)
      images[number, :count] = rng.integers(0, 256, (count, side, side, 3))
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), max(lengths) + 1), np.int32)
    for out, row in zip(ids, rows, strict=True):
      out[: len(row)] = row
    return jnp.asarray(ids), jnp.asarray(lengths), jnp.asarray(images)

  def sampled(
    self,
    prompts: tuple[jax.Array, jax.Array, jax.Array],
    prompt_index: Sequence[int] | np.ndarray,
    key: jax.Array,
    *,
    params: dict | None = None,
    mesh: Mesh | None = None,
    stop_strings: generate.StopStrings | None = None,
    row_limits: np.ndarray | None = None,
    poll: Callable[[], None] = generate.no_poll,
    on_finished: generate.OnFinished | None = None,
    on_tokens: generate.OnTokens | None = None,
    **settings: Any,
  ) -> tuple[engine.Completions, generate.RolloutReport]:
    """Completions and the report; on one device if no mesh is given."""
    mesh = mesh or mesh_of()
    params = self.params if params is None else params
    places = sharding.param_shardings(mesh, params)
    num_tokens = settings["max_new_tokens"]
    with jax.set_mesh(mesh):
      return generate.sample_completions(
        jax.tree.map(jax.device_put, params, places),
        sharding.device_put_batch(
          mesh,
          engine.Prompts(
            *map(np.asarray, prompts), np.asarray(prompt_index, np.int32)
          ),
        ),
        key,
        settings=engine.Settings(
          **{
            "config": self.config,
            "chunk_tokens": num_tokens,
            "temperature": 0.7,
            "dtype": jnp.dtype(jnp.float32),
          }
          | settings
        ),
        mesh=mesh,
        stop_strings=stop_strings,
        row_limits=row_limits,
        poll=poll,
        on_finished=on_finished,
        on_tokens=on_tokens,
      )


def mesh_of(replica: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh of the first devices."""
  shape = (replica, fsdp, tensor)
  devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
  return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.fixture(scope="session")
def tiny() -> Tiny:
  config = gemma3_config.ModelConfig(
    vocab_size=130,
    num_layers=6,
    embed_dim=16,
    hidden_dim=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    sliding_window=6,
    query_scale=8**-0.5,
    local_rope_base=10_000.0,
    global_rope_base=1_000_000.0,
    global_rope_factor=8.0,
    vision=gemma3_config.VisionConfig(
      image_size=16,
      patch_size=8,
      width=16,
      depth=1,
      mlp_dim=24,
      num_heads=2,
      soft_tokens=4,
    ),
  )
  params = weights.random_params(config, 0, jnp.float32)
  # Long vectors: now and then a stop token is much the likeliest.
  params["embedder"]["input_embedding"][list(GEMMA3.stop_ids)] *= 2
  return Tiny(config, jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="module")
def quick_compile():
  """For programs that run once: half the compile time, the same results."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def mounted(tmp_path):
  """Mounts a file system of its own; skips where this user may not."""
  folder = tmp_path / "mounted"
  folder.mkdir()

  def mount(*arguments):
    done = subprocess.run(
      ["mount", *arguments, str(folder)], capture_output=True, text=True
    )
    if done.returncode:
      pytest.skip(f"mount {arguments[0]}: {done.stderr.strip()}")
    return folder

  if shutil.which("mount") is None:
    pytest.skip("there is no mount command")
  yield mount
  while folder.is_mount():
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
