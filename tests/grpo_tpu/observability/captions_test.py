"""A sample's picture stays what it is, and its words are under it."""

import numpy as np
import pytest

from grpo_tpu.observability import captions


def picture(height: int, width: int) -> np.ndarray:
  values = np.random.default_rng(0).integers(0, 256, (height, width, 3))
  return values.astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (48, 48), (30, 321), (300, 896)])
def test_the_picture_is_on_top_pixel_by_pixel(shape):
  image = picture(*shape)
  (shown,) = captions.captioned(image, ["right answer: 3"])
  assert shown.dtype == np.uint8 and shown.shape[1] >= 320
  times = shown.shape[1] // shape[1]
  assert shown.shape[1] == times * shape[1]
  top = shown[: times * shape[0]]
  np.testing.assert_array_equal(top[::times, ::times], image)
  np.testing.assert_array_equal(top, np.kron(image, np.ones((times, times, 1))))


def test_other_words_are_another_strip_and_more_words_a_higher_one():
  image = picture(48, 48)
  (three,) = captions.captioned(image, ["right answer: 3"])
  (four,) = captions.captioned(image, ["right answer: 4"])
  (long,) = captions.captioned(image, ["word " * 20])
  assert three.shape == four.shape and (three != four).any()
  assert long.shape[0] > three.shape[0]


def test_whatever_a_model_writes_has_an_end_and_does_no_harm():
  image = picture(48, 48)
  (endless,) = captions.captioned(image, ["a" * 100_000])
  (hostile,) = captions.captioned(image, ["\x00\n\u202e\U0001f600\ud7ff", ""])
  assert endless.shape[0] < 1000 and hostile.shape[0] < 1000
