"""Makes images and prompts with transformers' Gemma3Processor.

Run by the Python of the peers' venv:
`python transformers_images.py IN.npz OUT.npz`. IN holds `file_0`, `file_1`,
... (encoded images), `size_0`, ... and the rows of `pan_and_scan`: enabled,
minimal size, most crops, minimal ratio. OUT holds, of row r and image i,
`pixels_r_i` as float32 [1 + crops, 3, size, size], and `text_r_i`, as the
processor expands one image marker.
"""

import io
import sys

# The processor with PIL has no use for it, and transformers imports it where
# it is installed, even if it does not fit the torch beside it.
sys.modules["torchvision"] = None

import numpy as np  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

NAMED = {
  "boi_token": "<start_of_image>",
  "eoi_token": "<end_of_image>",
  "image_token": "<image_soft_token>",
}
SOFT_TOKENS = 3


def processor():
  """A processor whose tokenizer only names its tokens."""
  words = {name: i for i, name in enumerate(["?", *NAMED.values()])}
  model = tokenizers.models.WordLevel(words, unk_token="?")
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizers.Tokenizer(model),
    extra_special_tokens=NAMED,
  )
  return transformers.Gemma3Processor(
    image_processor=transformers.Gemma3ImageProcessorPil(),
    tokenizer=tokenizer,
    image_seq_length=SOFT_TOKENS,
  )


def main(given_path, found_path):
  given, found = np.load(given_path), {}
  gemma3 = processor()
  count = sum(name.startswith("file_") for name in given)
  for row, i in np.ndindex(len(given["pan_and_scan"]), count):
    enabled, min_crop_size, max_num_crops, ratio = given["pan_and_scan"][row]
    side = int(given[f"size_{i}"])
    image = Image.open(io.BytesIO(given[f"file_{i}"].tobytes()))
    inputs = gemma3.image_processor(
      images=[[ImageOps.exif_transpose(image)]],
      size={"height": side, "width": side},
      do_convert_rgb=True,
      do_pan_and_scan=bool(enabled),
      pan_and_scan_min_crop_size=int(min_crop_size),
      pan_and_scan_max_num_crops=int(max_num_crops),
      pan_and_scan_min_ratio_to_activate=float(ratio),
    )
    pixels = np.stack(inputs["pixel_values"])
    found[f"pixels_{row}_{i}"] = pixels.astype(np.float32)
    found[f"text_{row}_{i}"] = gemma3.replace_image_token(inputs, 0)
  np.savez(found_path, **found)


if __name__ == "__main__":
  main(*sys.argv[1:])
