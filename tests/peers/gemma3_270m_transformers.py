"""Transformers on the real Gemma 3 270M, run by the Python of the peers' venv.

`python gemma3_270m_transformers.py FILE.gguf IN.npz OUT.npz`. IN holds
`ids_0`, `ids_1`, ... and, of each, `at_0`, ...: the positions whose logits OUT
has as `logits_0`, ... Beside them OUT has `frequencies`, of local and global
layers.
"""

import pathlib
import sys

# Nothing here needs one, and one that does not match torch breaks the import.
sys.modules["torchvision"] = None

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def main(file: str, given_path: str, found_path: str) -> None:
  path = pathlib.Path(file)
  model = transformers.Gemma3ForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()
  rotary = model.model.rotary_emb
  kinds = "sliding_attention", "full_attention"
  found = {
    "frequencies": np.stack(
      [getattr(rotary, f"{kind}_inv_freq").numpy() for kind in kinds]
    )
  }
  with np.load(given_path) as given, torch.no_grad():
    for name in given:
      if name.startswith("ids_"):
        number = name.removeprefix("ids_")
        states = model.model(torch.tensor(given[name])[None])[0][0]
        at = torch.tensor(given[f"at_{number}"])
        found[f"logits_{number}"] = model.lm_head(states[at]).numpy()
  np.savez(found_path, **found)


if __name__ == "__main__":
  main(*sys.argv[1:])
