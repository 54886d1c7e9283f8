"""Loads whole trees to one device."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import weights
from grpo_tpu.models.gemma3.convert import huggingface_config


def on_one_device(tree: dict) -> dict:
  """Shapes with this process's first device as their sharding."""
  mesh = jax.sharding.Mesh(jax.local_devices()[:1], ("one",))

  def place(x):
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * len(x.shape)))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(place, tree)


def from_hf(
  directory: str | os.PathLike[str],
) -> tuple[gemma3_config.ModelConfig, dict]:
  """A Hugging Face checkpoint of any sizes, in the type that it names."""
  config = huggingface_config.read(directory)
  opened = weights.open_files("hf", config, directory)
  values = json.loads((pathlib.Path(directory) / "config.json").read_text())
  dtype = values.get("torch_dtype") or values.get("dtype") or "float32"
  abstract = weights.abstract_params(config, jnp.dtype(dtype))
  return config, opened.load(on_one_device(abstract))
