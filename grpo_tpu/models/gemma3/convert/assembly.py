"""Assembles parameters on their devices, one tensor at a time.

Files hold one tensor per layer; the tree stacks all layers along a leading
axis. The stacks are created empty on the devices and filled in place, so host
memory holds one tensor of a layer, or the embedding, and never the model. Knows
nothing of file formats.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from data_pipelines.validation import printable
from grpo_tpu.models.gemma3 import config as gemma3_config
from grpo_tpu.models.gemma3 import leaves

_MAX_LISTED = 200
# Paths of the trees whose leaves are stacked.
_STACKS = ("layers", "vision_encoder/layers")

# Takes a layer (None outside of stacks) and the shape, dtype and sharding of
# each wanted piece by path; yields path and piece.
Read = Callable[
  [int | None, dict[str, jax.ShapeDtypeStruct]], Iterable[tuple[str, Any]]
]


def assemble(abstract: dict, read: Read) -> dict:
  """Assembles a stacked tree from pieces with any sharding."""
  shapes = leaves.by_path(abstract)
  update = functools.partial(jax.lax.dynamic_update_index_in_dim, axis=0)
  write = {
    path: jax.jit(update, donate_argnums=0, out_shardings=shape.sharding)
    for path, shape in shapes.items()
  }
  values: dict[str, jax.Array] = {}
  for layer, wanted in pieces(abstract):
    if layer == 0:
      values |= _zeros({path: shapes[path] for path in wanted})
    for path, value in read(layer, wanted):
      if layer is None:
        piece = jax.device_put(value, shapes[path].sharding)
      else:
        piece = write[path](values[path], value, np.int32(layer))
        # Waits, because the host could read ahead of the devices without bound.
        jax.block_until_ready(piece)
      values[path] = piece
  return jax.tree.unflatten(
    jax.tree.structure(abstract), [values[path] for path in shapes]
  )


def pieces(
  abstract: dict,
) -> Iterator[tuple[int | None, dict[str, jax.ShapeDtypeStruct]]]:
  """The pieces of a stacked tree by path: each leaf, or its part of a layer."""
  stacks: dict[str, dict] = {stack: {} for stack in _STACKS}
  for path, shape in leaves.by_path(abstract).items():
    stack = next((s for s in _STACKS if path.startswith(f"{s}/")), None)
    if stack is None:
      yield None, {path: shape}
    else:
      stacks[stack][path] = shape
  for shapes in filter(None, stacks.values()):
    layer_shapes = {path: _layer_shape(shape) for path, shape in shapes.items()}
    for layer in range(next(iter(shapes.values())).shape[0]):
      yield layer, layer_shapes


def _zeros(shapes: dict[str, Any]) -> dict[str, jax.Array]:
  def zeros():
    return {p: jnp.zeros(s.shape, s.dtype) for p, s in shapes.items()}

  shardings = {path: shape.sharding for path, shape in shapes.items()}
  return jax.jit(zeros, out_shardings=shardings)()


def _layer_shape(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  spec = PartitionSpec(*shape.sharding.spec[1:])
  sharding = NamedSharding(shape.sharding.mesh, spec)
  return jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype, sharding=sharding)


def check_tensors(
  found: Mapping[str, tuple[int, ...]],
  wanted: Mapping[str, tuple[int, ...]],
  source: str,
  *,
  faults: Mapping[str, str],
  remedy: str = "Give the complete, unaltered file of a Gemma 3 model.",
) -> None:
  """Checks the shapes of a file's tensors by the file's names.

  Raises a ValueError with the tensors that differ, and with `faults`, other
  reasons to refuse a tensor. `source` is the file's kind and path.
  """
  faults = dict(faults)
  for name in (found.keys() | wanted.keys()) - faults.keys():
    old = _brackets(found[name]) if name in found else "missing"
    new = f"{old}, wanted {_brackets(wanted.get(name, ()))}"
    if found.get(name) != wanted.get(name):
      faults[name] = new if name in wanted else f"extra, {old}"
  if faults:
    listed = sorted(faults)[:_MAX_LISTED]
    lines = [f"  {printable(name)}: {faults[name]}\n" for name in listed]
    if len(faults) > len(listed):
      lines.append(f"  and {len(faults) - len(listed)} more\n")
    raise ValueError(
      f"{source} must hold the tensors of its model and no others, but "
      f"{len(faults)} tensors differ:\n{''.join(lines)}{remedy}"
    )


def check_sizes(
  found: gemma3_config.ModelConfig,
  wanted: gemma3_config.ModelConfig,
  source: str,
) -> None:
  """Raises a ValueError with each size in which two models differ."""
  theirs, ours = _sizes(found), _sizes(wanted)
  differences = [
    f"{name} ({theirs.get(name)}, not {ours.get(name)})"
    for name in sorted(theirs.keys() | ours.keys())
    if not _are_close(theirs.get(name), ours.get(name))
  ]
  if differences:
    raise ValueError(
      f"{source} must hold the model of model.name, but differs in "
      f"{', '.join(differences)}; set model.name to the size of the file."
    )


def _sizes(config: gemma3_config.ModelConfig) -> dict[str, Any]:
  """Everything that decides about parameters and logits."""
  sizes = {k: v for k, v in vars(config).items() if k != "vision"}
  # Ids depend on the tokenizer, and the input size on the run.
  others = ("start_of_image", "end_of_image", "image_token", "input_size")
  tower = vars(config.vision) if config.vision else {}
  return sizes | {f"vision.{k}": v for k, v in tower.items() if k not in others}


def _are_close(a: Any, b: Any) -> bool:
  """True if equal; floats may be rounded to single precision in files."""
  are_floats = isinstance(a, float) and isinstance(b, float)
  return math.isclose(a, b, rel_tol=1e-6) if are_floats else a == b


def _brackets(shape: tuple[int, ...]) -> str:
  return f"[{','.join(str(int(n)) for n in shape)}]"
