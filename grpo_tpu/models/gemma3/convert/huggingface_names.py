"""Names of tensors in the Hugging Face files of every version of transformers.

`leaves.toml` has the names without these prefixes: `text`, `vision` and
`projector` stand for them.
"""

import re

# Prefixes of the released checkpoints and of later versions of transformers.
# The first match counts.
_PREFIXES = (
  (r"(model\.)?vision_tower\.(vision_model\.)?", "vision."),
  (r"(model\.)?multi_modal_projector\.", "projector."),
  (r"(language_model\.)?lm_head\.", "lm_head."),
  (r"(model\.language_model|language_model\.model|model)\.", "text."),
)
_RELEASED_PREFIXES = {
  "text": "language_model.model",
  "vision": "vision_tower.vision_model",
  "projector": "multi_modal_projector",
}
HEAD = "lm_head.weight"
EMBEDDING = "text.embed_tokens.weight"
# SigLIP's pooling head, which Gemma 3 does not use, and constant buffers.
UNUSED = re.compile(r"vision\.(head\.|embeddings\.position_ids$)")


def released_name(name: str) -> str:
  """A tensor's name in the released checkpoints with a vision tower."""
  prefix, _, rest = name.partition(".")
  return f"{_RELEASED_PREFIXES.get(prefix, prefix)}.{rest}"


def common_name(name: str) -> str:
  """Our name of a tensor, whichever version of transformers saved it."""
  for pattern, ours in _PREFIXES:
    if match := re.match(pattern, name):
      return ours + name[match.end() :]
  return name
