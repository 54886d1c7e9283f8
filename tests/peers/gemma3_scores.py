"""Transformers' reward models, run by the Python of the peers' venv.

`make FOLDER` saves tiny random ones with the inputs of `gemma3_transformers`
and their scores, and an adapter of peft for each; `score FOLDER NAME...` writes
the scores of models that others have saved, or of MODEL+ADAPTER.
"""

import pathlib
import sys

import gemma3_transformers as tiny
import numpy as np
import torch
import transformers


def models() -> dict:
  text = transformers.Gemma3TextForSequenceClassification
  image = transformers.Gemma3ForSequenceClassification
  configs = {name: x.config for name, x in tiny.models().items()}
  for config in configs.values():
    config.num_labels = 1
  return {"image": image(configs["image"]), "text": text(configs["text"])}


def write_scores(folder: pathlib.Path, name: str, model) -> None:
  """The scores of rows that are padded on the right, and on the left."""
  arrays, _ = tiny.expanded(model, dict(np.load(folder / "inputs.npz")))
  lengths = arrays["attention_mask"].sum(dim=1).tolist()
  moved = {
    key: torch.stack(
      [x.roll(len(x) - n, 0) for x, n in zip(arrays[key], lengths, strict=True)]
    )
    for key in arrays.keys() - {"pixel_values"}
  }
  with torch.no_grad():
    right = model.eval()(**arrays).logits.numpy()
    left = model(**arrays | moved).logits.numpy()
  np.savez(folder / f"{name}.npz", right=right, left=left)


def loaded(path: pathlib.Path):
  """A model that others have saved, of which nothing is left out."""
  auto = transformers.AutoModelForSequenceClassification
  model, report = auto.from_pretrained(path, output_loading_info=True)
  assert not any(report.values()), report
  return model


def main() -> None:
  import peft

  command, folder = sys.argv[1], pathlib.Path(sys.argv[2])
  if command == "make":
    torch.manual_seed(0)
    np.savez(folder / "inputs.npz", **tiny.inputs())
    for name, model in models().items():
      for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.05, 0.2)
      model.save_pretrained(folder / name)
      write_scores(folder, name, model)
      layers = r".*language_model.*" if name == "image" else r".*layers.*"
      config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        init_lora_weights=False,
        target_modules=layers + r"\.(q_proj|k_proj|v_proj)",
        task_type="SEQ_CLS",
      )
      adapted = peft.get_peft_model(model, config)
      torch.nn.init.normal_(adapted.score.modules_to_save.default.weight)
      adapted.save_pretrained(folder / f"{name}_adapter")
      write_scores(folder, f"{name}_adapted", adapted)
    return
  for name in sys.argv[3:]:
    base, _, adapter = name.partition("+")
    model = loaded(folder / base)
    if adapter:
      model = peft.PeftModel.from_pretrained(model, folder / adapter)
    write_scores(folder, adapter or base, model)


if __name__ == "__main__":
  main()
