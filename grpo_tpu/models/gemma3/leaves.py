"""The leaves of the parameter tree: their axes, and their names in files.

`leaves.toml` has an entry for each leaf. Shapes, random values, adapters and
all file formats read it.

References:
  transformers 5.23, `models/gemma3/modeling_gemma3.py`
  `gm.ckpts` of https://github.com/google-deepmind/gemma
  Names in GGUF files: `llm_build_gemma3` of llama.cpp
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from data_pipelines.text import tables


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf, and the tensors of files that hold its values."""

  # One letter per axis, as in "lqdh". The first may be `l` for layers and `n`
  # for matrices side by side; both are stacked here, and spread over the
  # tensors of Hugging Face and GGUF files.
  axes: str
  file_axes: (
    str  # Of these tensors, as in "qh d": `q` and `h` merged, then `d`.
  )
  # Their names without prefix, with `{}` for the layer; one for each matrix.
  huggingface: Sequence[str]
  gemma: str  # The library has all matrices of a layer in one such tensor.
  gguf: Sequence[str] = ()  # None for a leaf of images.
  summed: str = ""  # Axes that a product sums; none for norms and biases.

  @property
  def num_stacked(self) -> int:
    """Number of leading axes that are spread over tensors."""
    return sum(axis in "ln" for axis in self.axes)

  def tensor(
    self, file: Literal["huggingface", "gguf"], index: tuple[int, ...]
  ) -> str:
    """The name of the tensor at an index of the stacked axes."""
    at = dict(zip(self.axes, index, strict=False))
    return getattr(self, file)[at.get("n", 0)].format(at.get("l"))

  def file_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of each tensor, from the length of each axis."""
    groups = self.file_axes.split()
    return tuple(math.prod(sizes[axis] for axis in group) for group in groups)

  def fan_in(self, sizes: Mapping[str, int]) -> int:
    """Number of terms that a product with the leaf sums."""
    return math.prod(sizes[axis] for axis in self.summed)

  def sizes(self, shape: tuple[int, ...]) -> dict[str, int]:
    """The length of each axis of the whole leaf."""
    return dict(zip(self.axes, shape, strict=True))


LEAVES = {
  path: Leaf(**fields)
  for path, fields in tables.read(__package__, "leaves.toml").items()
}


def by_path(tree: Any) -> dict[str, Any]:
  """Leaves by path, as in `layers/attn/q_einsum`."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def file_shapes(
  params: Any, file: Literal["huggingface", "gguf"]
) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor of a tree, by its name in files."""
  return {
    leaf.tensor(file, index): leaf.file_shape(leaf.sizes(x.shape))
    for path, x in by_path(params).items()
    for leaf in [LEAVES[path]]
    for index in np.ndindex(*x.shape[: leaf.num_stacked])
  }
