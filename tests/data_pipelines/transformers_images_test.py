"""Compares images and their words with transformers' Gemma3Processor."""

import dataclasses
import io
import pathlib
import subprocess

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import images, records
from data_pipelines.text import chat_prompts
from data_pipelines.text import tokenizer as tokens
from data_pipelines.text.chat_format import GEMMA3

pytestmark = pytest.mark.peers

SCRIPT = pathlib.Path(__file__).with_name("transformers_images.py")
SETTINGS = (images.WHOLE, dataclasses.replace(images.WHOLE, enabled=True))
# RGBA, grey, palette and RGB; all but the last three are PNGs named .jpg. Wide,
# tall, nearly square, larger and smaller than what they are resized to.
PIDS = ("1", "7", "11", "14", "16", "19", "23", "34", "31")
SOFT_TOKENS = 3


def encoded(image, format="PNG", **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def drawn_images():
  """A transparent image and a rotated one, which the snapshot lacks."""
  rng = np.random.default_rng(0)
  noise = Image.fromarray(rng.integers(0, 256, (280, 900, 4), np.uint8))
  exif = Image.Exif()
  exif[0x0112] = 6
  palette = noise.convert("RGB").quantize(16)
  return [
    encoded(noise),
    encoded(noise.convert("LA")),
    encoded(palette, transparency=3),
    encoded(noise.convert("RGB"), "JPEG", exif=exif),
  ]


@pytest.fixture(scope="module")
def files(fixtures):
  found = {}
  folder = fixtures / "mathvista_schema" / "data"
  for path in sorted(folder.glob("testmini-*.parquet")):
    for row in pq.read_table(
      path, columns=["pid", "decoded_image"]
    ).to_pylist():
      found[row["pid"]] = row["decoded_image"]["bytes"]
  return [*(found[pid] for pid in PIDS), *drawn_images()]


@pytest.fixture(scope="module")
def theirs(files, peers_python, tmp_path_factory):
  """transformers' pixel values and image text, by setting and image."""
  given = {"pan_and_scan": np.array([*map(dataclasses.astuple, SETTINGS)])}
  for i, data in enumerate(files):
    given[f"file_{i}"] = np.frombuffer(data, np.uint8)
    given[f"size_{i}"] = np.array(size_of(i))
  folder = tmp_path_factory.mktemp("peers")
  np.savez(folder / "given.npz", **given)
  ran = subprocess.run(
    [peers_python, SCRIPT, folder / "given.npz", folder / "found.npz"],
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr
  with np.load(folder / "found.npz") as file:
    return dict(file)


def size_of(i):
  """The released models' size for one image; smaller for the others."""
  return 896 if i == 0 else 224


@pytest.mark.parametrize("row", range(len(SETTINGS)))
def test_pixels_are_those_of_transformers(files, theirs, row):
  """Equal as uint8; equal up to rounding as the floats that a model reads."""
  num_crops = []
  for i, data in enumerate(files):
    ours = images.views(images.decode(data), size_of(i), SETTINGS[row])
    values = theirs[f"pixels_{row}_{i}"].transpose(0, 2, 3, 1)
    steps = np.rint((values + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(ours, steps)
    np.testing.assert_allclose(ours / 127.5 - 1, values, atol=1e-6)
    num_crops.append(len(values) - 1)
  assert set(num_crops) == ({0, 2, 3, 4} if SETTINGS[row].enabled else {0})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  tokens.train(["Here is a picture. How many?"] * 5, path, vocab_size=512)
  return tokens.Tokenizer(path)


def spelt(ids, tokenizer):
  """The text of ids as transformers writes it, with images."""
  named = {
    GEMMA3.image_placeholder: "<image_soft_token>",
    tokenizer.start_of_image: "<start_of_image>",
    tokenizer.end_of_image: "<end_of_image>",
    GEMMA3.bos: "<bos>",
    GEMMA3.start_of_turn: "<start_of_turn>",
    GEMMA3.end_of_turn: "<end_of_turn>",
  }
  return "".join(named.get(i) or tokenizer.decode([i]) for i in ids)


@pytest.mark.parametrize("row", range(len(SETTINGS)))
def test_images_are_introduced_in_the_words_of_transformers(
  files, theirs, tokenizer, row
):
  problem = records.from_result({"question": "How many?", "query": "How many?"})
  problem = dataclasses.replace(problem, images=(b"image",))
  for i, data in enumerate(files):
    ids = chat_prompts.encode_prompt(
      problem,
      tokenizer,
      soft_tokens=SOFT_TOKENS,
      num_crops=[images.num_crops(data, SETTINGS[row])],
    )
    assert spelt(ids, tokenizer) == (
      f"<bos><start_of_turn>user\n{theirs[f'text_{row}_{i}']}"
      f"{chat_prompts.prompt_text(problem)}<end_of_turn>\n<start_of_turn>model\n"
    )
