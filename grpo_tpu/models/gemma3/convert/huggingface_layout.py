"""Name and axes in Hugging Face's files of each leaf of our tree.

One table serves loading and saving. Knows nothing of values or files.

References:
  transformers 5.23, `models/gemma3/modeling_gemma3.py`.
"""

import math
import re
from typing import Any, NamedTuple

import jax


class Layout(NamedTuple):
  """The tensors of a leaf.

  Attributes:
    names: Names of the tensors, with `{}` for the layer; more than one if the
      leaf stacks several.
    file: Axes of each tensor, as in "qh d": `q` and `h` merged, then `d`.
    ours: Axes of the leaf, as in "lqdh". The first may be `l` for layers and
      `p` for parts, which are spread over tensors.
  """

  names: tuple[str, ...]
  file: str
  ours: str

  @property
  def num_stacked(self) -> int:
    """Number of leading axes that are spread over tensors."""
    return sum(axis in "lp" for axis in self.ours)

  def tensor(self, index: tuple[int, ...]) -> str:
    """The name of the tensor at an index of the stacked axes."""
    at = dict(zip(self.ours, index, strict=False))
    return self.names[at.get("p", 0)].format(at.get("l"))

  def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of each tensor of a leaf of `shape`."""
    size = dict(zip(self.ours, shape, strict=True))
    return tuple(
      math.prod(size[axis] for axis in group) for group in self.file.split()
    )


def _layer(names: tuple[str, ...], file: str, ours: str) -> Layout:
  return Layout(tuple(f"text.layers.{{}}.{x}" for x in names), file, ours)


def _norm(name: str, ours: str = "ld") -> Layout:
  return _layer((f"{name}.weight",), ours[1:], ours)


def _block(name: str, file: str, ours: str) -> Layout:
  return Layout((f"vision.encoder.layers.{{}}.{name}",), file, ours)


# By a leaf's path. `text`, `vision` and `projector` stand for the prefixes.
LAYOUTS = {
  "embedder/input_embedding": Layout(
    ("text.embed_tokens.weight",), "v d", "vd"
  ),
  "embedder/mm_input_projection": Layout(
    ("projector.mm_input_projection_weight",), "w d", "wd"
  ),
  "embedder/mm_soft_embedding_norm/scale": Layout(
    ("projector.mm_soft_emb_norm.weight",), "w", "w"
  ),
  "final_norm/scale": Layout(("text.norm.weight",), "d", "d"),
  "layers/pre_attention_norm/scale": _norm("input_layernorm"),
  "layers/post_attention_norm/scale": _norm("post_attention_layernorm"),
  "layers/pre_ffw_norm/scale": _norm("pre_feedforward_layernorm"),
  "layers/post_ffw_norm/scale": _norm("post_feedforward_layernorm"),
  "layers/attn/query_norm/scale": _norm("self_attn.q_norm", "lh"),
  "layers/attn/key_norm/scale": _norm("self_attn.k_norm", "lh"),
  "layers/attn/q_einsum": _layer(("self_attn.q_proj.weight",), "qh d", "lqdh"),
  "layers/attn/kv_einsum": _layer(
    ("self_attn.k_proj.weight", "self_attn.v_proj.weight"), "kh d", "lpkdh"
  ),
  "layers/attn/attn_vec_einsum": _layer(
    ("self_attn.o_proj.weight",), "d qh", "lqhd"
  ),
  "layers/mlp/gating_einsum": _layer(
    ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "f d", "lpfd"
  ),
  "layers/mlp/linear": _layer(("mlp.down_proj.weight",), "d f", "lfd"),
  "vision_encoder/embedding/kernel": Layout(
    ("vision.embeddings.patch_embedding.weight",), "w c y x", "yxcw"
  ),
  "vision_encoder/embedding/bias": Layout(
    ("vision.embeddings.patch_embedding.bias",), "w", "w"
  ),
  "vision_encoder/pos_embedding": Layout(
    ("vision.embeddings.position_embedding.weight",), "n w", "pnw"
  ),
  "vision_encoder/norm/scale": Layout(
    ("vision.post_layernorm.weight",), "w", "w"
  ),
  "vision_encoder/norm/bias": Layout(("vision.post_layernorm.bias",), "w", "w"),
  "vision_encoder/layers/out/kernel": _block(
    "self_attn.out_proj.weight", "w qh", "lqhw"
  ),
  "vision_encoder/layers/out/bias": _block(
    "self_attn.out_proj.bias", "w", "lw"
  ),
  "vision_encoder/layers/mlp_in/kernel": _block("mlp.fc1.weight", "f w", "lwf"),
  "vision_encoder/layers/mlp_in/bias": _block("mlp.fc1.bias", "f", "lf"),
  "vision_encoder/layers/mlp_out/kernel": _block(
    "mlp.fc2.weight", "w f", "lfw"
  ),
  "vision_encoder/layers/mlp_out/bias": _block("mlp.fc2.bias", "w", "lw"),
  **{
    f"vision_encoder/layers/{ours}/{part}": _block(
      f"{theirs}.{name}", "w", "lw"
    )
    for ours, theirs in (
      ("attention_norm", "layer_norm1"),
      ("mlp_norm", "layer_norm2"),
    )
    for part, name in (("scale", "weight"), ("bias", "bias"))
  },
  **{
    f"vision_encoder/layers/{ours}/{part}": _block(
      f"self_attn.{ours[0]}_proj.{name}", file, axes
    )
    for ours in ("query", "key", "value")
    for part, name, file, axes in (
      ("kernel", "weight", "qh w", "lwqh"),
      ("bias", "bias", "qh", "lqh"),
    )
  },
}

# Prefixes of the released checkpoints and of later versions of transformers.
# The first match counts.
_PREFIXES = (
  (r"(model\.)?vision_tower\.(vision_model\.)?", "vision."),
  (r"(model\.)?multi_modal_projector\.", "projector."),
  (r"(language_model\.)?lm_head\.", "lm_head."),
  (r"(model\.language_model|language_model\.model|model)\.", "text."),
)
HEAD = "lm_head.weight"
EMBEDDING = "text.embed_tokens.weight"
# SigLIP's pooling head, which Gemma 3 does not use, and constant buffers.
UNUSED = re.compile(r"vision\.(head\.|embeddings\.position_ids$)")


def released_name(name: str) -> str:
  """A tensor's name in the released checkpoints with a vision tower."""
  for ours, theirs in (
    ("text.", "language_model.model."),
    ("vision.", "vision_tower.vision_model."),
    ("projector.", "multi_modal_projector."),
  ):
    if name.startswith(ours):
      return theirs + name.removeprefix(ours)
  return name


def common_name(name: str) -> str:
  """Our name of a tensor, whichever version of transformers saved it."""
  for pattern, ours in _PREFIXES:
    if match := re.match(pattern, name):
      return ours + name[match.end() :]
  return name


def layout_of(path: Any) -> Layout:
  """The layout of the leaf at a key path of the tree."""
  return LAYOUTS[jax.tree_util.keystr(path, simple=True, separator="/")]
