"""Parameters put together on their devices, one tensor at a time.

Files hold a tensor per layer where the tree stacks all layers along a leading
axis. Here the stacks are made on the devices, empty, and filled in place, so
that host memory holds one tensor of a layer or the embedding, never the model.
Knows nothing of file formats.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from grpo_tpu.models.gemma3 import config as gemma3_config

# Paths of the trees whose leaves are stacked.
_STACKS = ("layers", "vision_encoder/layers")

Place = Callable[[dict], dict]
# Given a stack's layer (None outside of stacks) and the pieces wanted, by path
# (shape, dtype and sharding), yields path and piece of each as it is asked for.
Read = Callable[
  [int | None, dict[str, jax.ShapeDtypeStruct]], Iterable[tuple[str, Any]]
]


def on_one_device(tree: dict) -> dict:
  """The shapes, all on this process's first device."""
  place = SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
  )


def assembled(abstract: dict, read: Read) -> dict:
  """The tree of `abstract`, filled piece by piece.

  Args:
    abstract: Shapes, dtypes and shardings of the stacked tree.
    read: What gives the pieces asked for. An array that is not on its devices
      yet is cast and put there.
  """
  shapes = by_path(abstract)
  values: dict[str, jax.Array] = {}
  for path, shape in shapes.items():
    if _stack_of(path) is None:
      ((_, value),) = read(None, {path: shape})
      values[path] = _put(value, shape)
  for stack in _STACKS:
    inside = {p: s for p, s in shapes.items() if _stack_of(p) == stack}
    if inside:
      values |= _filled_stack(inside, read)
  leaves = [values[path] for path in shapes]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def by_path(tree: Any) -> dict[str, Any]:
  """Leaves by path, as in `layers/attn/q_einsum`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def pieces(
  abstract: dict,
) -> Iterator[tuple[str, int | None, tuple[int, ...]]]:
  """Path, layer (None outside of stacks) and shape of all that is read."""
  for path, leaf in by_path(abstract).items():
    if _stack_of(path) is None:
      yield path, None, leaf.shape
    else:
      yield from ((path, i, leaf.shape[1:]) for i in range(leaf.shape[0]))


def _stack_of(path: str) -> str | None:
  return next((s for s in _STACKS if path.startswith(f"{s}/")), None)


def _filled_stack(shapes: dict[str, Any], read: Read) -> dict[str, jax.Array]:
  places = {path: shape.sharding for path, shape in shapes.items()}
  pieces = {path: _of_one_layer(shape) for path, shape in shapes.items()}

  def zeros():
    return {p: jnp.zeros(s.shape, s.dtype) for p, s in shapes.items()}

  stacks = jax.jit(zeros, out_shardings=places)()
  put = {
    path: jax.jit(_with_layer, donate_argnums=0, out_shardings=place)
    for path, place in places.items()
  }
  num_layers = next(iter(shapes.values())).shape[0]
  for index in range(num_layers):
    for path, value in read(index, pieces):
      piece = _put(value, pieces[path])
      # Waits, or the host would read ahead of the devices without bound.
      stacks[path] = jax.block_until_ready(
        put[path](stacks[path], piece, np.int32(index))
      )
  return stacks


def _with_layer(stack: jax.Array, layer: jax.Array, index: Any) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)


def _of_one_layer(shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
  sharding = shape.sharding
  if isinstance(sharding, NamedSharding):
    spec = PartitionSpec(*sharding.spec[1:])
    sharding = NamedSharding(sharding.mesh, spec)
  return jax.ShapeDtypeStruct(shape.shape[1:], shape.dtype, sharding=sharding)


def _put(value: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
  assert value.shape == shape.shape, (value.shape, shape.shape)
  if isinstance(value, jax.Array):
    return value
  value = value.astype(shape.dtype, copy=False)
  return jax.make_array_from_callback(
    shape.shape, shape.sharding, lambda index: value[index]
  )


def check_tensors(
  found: Mapping[str, tuple[int, ...]],
  wanted: Mapping[str, tuple[int, ...]],
  source: str,
  *,
  unreadable: Mapping[str, str],
) -> None:
  """Raises one error that lists every tensor that is not as it must be.

  Args:
    found: Shapes of the file's tensors by the file's names.
    wanted: Those that the model has, by the same names.
    source: What the file is, for the message.
    unreadable: Why a tensor found cannot be read, by its name.
  """
  faults = []
  for name in sorted(found.keys() | wanted.keys()):
    if name not in found:
      faults.append(f"  {name}: missing, wanted {_brackets(wanted[name])}")
    elif name not in wanted:
      faults.append(f"  {name}: extra, {_brackets(found[name])}")
    elif tuple(found[name]) != tuple(wanted[name]):
      faults.append(
        f"  {name}: {_brackets(found[name])}, wanted {_brackets(wanted[name])}"
      )
    elif name in unreadable:
      faults.append(f"  {name}: {unreadable[name]}")
  if faults:
    raise ValueError(
      f"{source} must hold the tensors of its model and no others, but "
      f"{len(faults)} are not so:\n" + "\n".join(faults) + "\nGive the file of "
      "a Gemma 3 model as released or converted, whole and unaltered."
    )


def check_config(
  found: gemma3_config.ModelConfig,
  wanted: gemma3_config.ModelConfig,
  source: str,
) -> None:
  """Raises where a file's model is another than the one wanted, field by field.

  Args:
    found: What the file holds.
    wanted: The sizes of `model.name`.
    source: What the file is, for the message.
  """
  names = type(found).__dataclass_fields__
  faults = [
    f"{name} {getattr(found, name)!r} for {getattr(wanted, name)!r}"
    for name in names
    if not _is_close(getattr(found, name), getattr(wanted, name))
  ]
  if faults:
    raise ValueError(
      f"{source} must hold the model of model.name, but it has "
      f"{', '.join(faults)}; set model.name to the size that the file is."
    )


def _is_close(a: Any, b: Any) -> bool:
  """Equal, but for floats that a file keeps in single precision."""
  if isinstance(a, float) and isinstance(b, float):
    return abs(a - b) <= 1e-6 * abs(b)
  return a == b


def _brackets(shape: tuple[int, ...]) -> str:
  return f"[{','.join(str(int(n)) for n in shape)}]"
