"""Transformers' side of a comparison, run by the Python of the peers' venv.

`make FOLDER` saves tiny random models with inputs and their logits, and an
adapter of peft for each, with the logits of both together;
`answer FOLDER MODEL...` writes the logits of models that others have saved, and
`adapt FOLDER BASE ADAPTER` those of one with an adapter, which it names.
"""

import pathlib
import sys

# Nothing here needs one, and one that does not match torch breaks the import.
sys.modules["torchvision"] = None

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

VOCAB, SOFT_TOKENS, IMAGE_SIZE = 300, 4, 32
START, PLACEHOLDER, END, BLANK_LINE, PAD = 297, 298, 299, 108, 0


def text_config() -> dict:
  """Windows shorter than a row, a remainder after the period, shared heads."""
  return {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 6,
    "query_pre_attn_scalar": 10,
    "rope_parameters": {
      "full_attention": {
        "rope_type": "linear",
        "factor": 8.0,
        "rope_theta": 1e6,
      },
      "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
  }


def models() -> dict:
  image = transformers.Gemma3Config(
    text_config=text_config(),
    vision_config={
      "hidden_size": 24,
      "intermediate_size": 40,
      "num_hidden_layers": 2,
      "num_attention_heads": 2,
      "image_size": IMAGE_SIZE,
      "patch_size": 8,
      "vision_use_head": False,
    },
    mm_tokens_per_image=SOFT_TOKENS,
    image_token_index=PLACEHOLDER,
    boi_token_index=START,
    eoi_token_index=END,
  )
  text = transformers.Gemma3TextConfig(**text_config())
  return {
    "image": transformers.Gemma3ForConditionalGeneration(image),
    "text": transformers.Gemma3ForCausalLM(text),
  }


def inputs() -> dict[str, np.ndarray]:
  """Rows of two images, one and none, of different lengths."""
  rng = np.random.default_rng(1)
  words = rng.integers(110, START, (3, 20))
  rows = [
    [2, *words[0, :3], START, *words[0, 3:6], START, *words[0, 6:12]],
    [2, START, *words[1, :10]],
    [2, *words[2, :17]],
  ]
  tokens = np.zeros((3, max(map(len, rows))), np.int32)
  for out, row in zip(tokens, rows, strict=True):
    out[: len(row)] = row
  size = (3, 2, IMAGE_SIZE, IMAGE_SIZE, 3)
  return {
    "tokens": tokens,
    "images": rng.integers(0, 256, size, dtype=np.uint8),
    "num_images": np.array([2, 1, 0]),
  }


def expanded(model, given: dict[str, np.ndarray]) -> tuple[dict, list]:
  """The inputs with each marker expanded as the processor does it.

  And the positions in them of the given tokens.
  """
  config = model.config
  has_vision = hasattr(config, "vision_config")
  start = config.boi_token_index if has_vision else None
  placeholder = config.image_token_index if has_vision else None
  block = []
  if has_vision:
    soft = [placeholder] * config.mm_tokens_per_image
    block = [start, *soft, config.eoi_token_index]
    block = [BLANK_LINE, *block, BLANK_LINE]
  rows, positions = [], []
  for row in given["tokens"].tolist():
    ids, at = [], []
    for token in row:
      at.append(len(ids))
      ids += block if has_vision and token == start else [token]
    rows.append(ids)
    positions.append(at)
  longest = max(map(len, rows))
  ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
  extra = {}
  if has_vision:
    pictures = np.concatenate(
      [
        images[:n]
        for images, n in zip(given["images"], given["num_images"], strict=True)
      ]
    )
    pixels = torch.tensor(pictures / 127.5 - 1, dtype=model.dtype)
    extra["pixel_values"] = pixels.permute(0, 3, 1, 2)
    extra["token_type_ids"] = (ids == placeholder).long()
  return extra | {
    "input_ids": ids,
    "attention_mask": (ids != PAD).long(),
  }, positions


def logits(model, given: dict[str, np.ndarray]) -> np.ndarray:
  """At the given tokens."""
  arrays, positions = expanded(model, given)
  with torch.no_grad():
    out = model.eval()(**arrays).logits.float()
  at = torch.tensor(positions)[..., None].expand(-1, -1, out.shape[-1])
  return torch.gather(out, 1, at).numpy()


def with_adapter(model, name: str):
  """The model with a random adapter of usual targets, none of them zero."""
  import peft

  if name == "text":  # The default of many scripts.
    targets = {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
  else:
    kinds = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    projector = "multi_modal_projector.mm_input_projection_weight"
    targets = {
      "target_modules": rf".*language_model.*\.({kinds})",
      "target_parameters": [projector],
    }
  config = peft.LoraConfig(
    r=3, lora_alpha=5, init_lora_weights=False, **targets
  )
  return peft.get_peft_model(model, config).eval()


def main() -> None:
  command, folder = sys.argv[1], pathlib.Path(sys.argv[2])
  if command == "make":
    torch.manual_seed(0)
    np.savez(folder / "inputs.npz", **inputs())
    for name, model in models().items():
      for parameter in model.parameters():
        # Norms and projector too, so that no factor can hide.
        torch.nn.init.normal_(parameter, 0.05, 0.2)
      model.save_pretrained(folder / name)
      answer = logits(model, dict(np.load(folder / "inputs.npz")))
      np.savez(folder / f"{name}.npz", logits=answer)
      adapted = with_adapter(model, name)
      adapted.save_pretrained(folder / f"{name}_adapter")
      write_answer(folder, f"{name}_adapted", adapted)
  elif command == "answer":
    for name in sys.argv[3:]:
      write_answer(folder, name, loaded(folder / name))
  else:
    from peft import PeftModel

    base, name = sys.argv[3:]
    model = PeftModel.from_pretrained(loaded(folder / base), folder / name)
    write_answer(folder, name, model)


def loaded(path: pathlib.Path):
  """A model that others have saved, of which nothing is left out."""
  auto = transformers.AutoModelForCausalLM
  if "vision_config" in transformers.AutoConfig.from_pretrained(path).to_dict():
    auto = transformers.AutoModelForImageTextToText
  model, report = auto.from_pretrained(path, output_loading_info=True)
  assert not any(report.values()), report
  return model


def write_answer(folder: pathlib.Path, name: str, model) -> None:
  answer = logits(model, dict(np.load(folder / "inputs.npz")))
  kind = str(model.dtype).removeprefix("torch.")
  np.savez(folder / f"{name}.npz", logits=answer, dtype=kind)


if __name__ == "__main__":
  main()
