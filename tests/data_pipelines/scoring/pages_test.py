"""Images on pages are small, and pages are made of text alone."""

import base64
import io

import numpy as np
import PIL.Image
import pytest

from data_pipelines.scoring.pages import image_uri


@pytest.mark.parametrize("kind", ["flat", "noisy"])
def test_an_image_is_shrunk_and_kept_in_the_smaller_format(kind):
  image = np.full((700, 960, 3), 77, np.uint8)
  if kind == "noisy":
    image = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
  file = io.BytesIO()
  PIL.Image.fromarray(image).save(file, "png")
  uri = image_uri(file.getvalue())
  wanted = {"flat": "png", "noisy": "jpeg"}[kind]
  head = f"data:image/{wanted};base64,"
  assert uri.startswith(head)
  shown = PIL.Image.open(io.BytesIO(base64.b64decode(uri[len(head) :])))
  assert shown.size == (480, 350)
  mean = np.asarray(shown).mean()
  assert mean == pytest.approx(image.mean(), abs=1)
  assert image_uri(file.getvalue()) == uri


def test_a_damaged_image_is_none():
  assert image_uri(b"\x89PNG") == ""
