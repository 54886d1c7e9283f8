"""Gemma 3's decoder on one row of text, in NumPy and float64: a slow twin.

Written from the report alone, except for the names of the tree.
"""

import numpy as np


def rotary(config, num_tokens):
  """Sines and cosines of local (0) and global (1) layers."""
  exponent = np.arange(0, config.head_dim, 2) / config.head_dim
  position = np.arange(num_tokens)[:, None]
  angle = np.stack(
    [
      position / config.local_rope_base**exponent,
      position / config.global_rope_base**exponent / config.global_rope_factor,
    ]
  )
  return np.sin(angle), np.cos(angle)


def states(config, params, ids, *, tables=None):
  """Final states of every token, from which the embedding makes logits.

  Args:
    config: Sizes of the network.
    params: The stacked tree, in any type of float.
    ids: Ids of one row.
    tables: RoPE tables to use instead of `rotary`.
  """
  sin, cos = tables or rotary(config, len(ids))
  layers, heads = params["layers"], config.num_heads // config.num_kv_heads
  distance = np.subtract.outer(np.arange(len(ids)), np.arange(len(ids)))
  x = np.asarray(params["embedder"]["input_embedding"])[ids].astype(float)
  x *= config.embed_dim**0.5
  for i in range(config.num_layers):
    is_global = i % 6 == 5

    def of(*path, i=i):
      tree = layers
      for name in path:
        tree = tree[name]
      return np.asarray(tree[i], float)

    turn = sin[int(is_global)], cos[int(is_global)]
    y = normed(x, of("pre_attention_norm", "scale"))
    q = np.einsum("td,qdh->qth", y, of("attn", "q_einsum"), optimize=True)
    k, v = np.einsum("td,nkdh->nkth", y, of("attn", "kv_einsum"), optimize=True)
    q = rotated(normed(q, of("attn", "query_norm", "scale")), *turn)
    k = rotated(normed(k, of("attn", "key_norm", "scale")), *turn)
    seen = distance >= 0
    if not is_global:
      seen &= distance < config.sliding_window
    read = np.empty_like(q)
    for head in range(config.num_heads):
      scores = q[head] @ k[head // heads].T * config.query_scale
      scores = np.where(seen, scores, -np.inf)
      scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
      scores /= scores.sum(axis=-1, keepdims=True)
      read[head] = scores @ v[head // heads]
    y = np.einsum(
      "qth,qhd->td", read, of("attn", "attn_vec_einsum"), optimize=True
    )
    x = x + normed(y, of("post_attention_norm", "scale"))
    y = normed(x, of("pre_ffw_norm", "scale"))
    gate, up = (y @ w.T for w in of("mlp", "gating_einsum"))
    cubic = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
    y = 0.5 * gate * (1 + np.tanh(cubic)) * up @ of("mlp", "linear")
    x = x + normed(y, of("post_ffw_norm", "scale"))
  return normed(x, np.asarray(params["final_norm"]["scale"], float))


def normed(x, scale):
  mean_square = np.square(x).mean(axis=-1, keepdims=True)
  return x / np.sqrt(mean_square + 1e-6) * (1 + scale)


def rotated(x, sin, cos):
  a, b = np.split(x, 2, axis=-1)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
