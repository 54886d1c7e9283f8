"""The image of a sample is unchanged, and its text is below."""

import numpy as np
import pytest

from grpo_tpu.observability import captions


def random_image(height: int, width: int) -> np.ndarray:
  values = np.random.default_rng(0).integers(0, 256, (height, width, 3))
  return values.astype(np.uint8)


@pytest.mark.parametrize("shape", [(1, 1), (48, 48), (30, 321), (300, 896)])
def test_the_image_is_on_top_pixel_by_pixel(shape):
  image = random_image(*shape)
  (shown,) = captions.add_caption(image, ["right answer: 3"])
  assert shown.dtype == np.uint8 and shown.shape[1] >= 320
  times = shown.shape[1] // shape[1]
  assert shown.shape[1] == times * shape[1]
  top = shown[: times * shape[0]]
  np.testing.assert_array_equal(top[::times, ::times], image)
  np.testing.assert_array_equal(top, np.kron(image, np.ones((times, times, 1))))


def test_other_text_changes_the_strip_and_more_text_makes_it_higher():
  image = random_image(48, 48)
  (three,) = captions.add_caption(image, ["right answer: 3"])
  (four,) = captions.add_caption(image, ["right answer: 4"])
  (long,) = captions.add_caption(image, ["word " * 20])
  assert three.shape == four.shape and (three != four).any()
  assert long.shape[0] > three.shape[0]


def test_a_long_question_leaves_room_for_what_was_answered():
  image = random_image(48, 48)
  texts = ["why " * 500, "right answer: 3", "no " * 500]
  shown = [
    captions.add_caption(image, [*texts[:n], "x", *texts[n + 1 :]])
    for n in range(3)
  ]
  whole = captions.add_caption(image, texts)
  assert not any(np.array_equal(whole, other) for other in shown)


def test_any_text_gives_a_strip_of_limited_height():
  image = random_image(48, 48)
  (endless,) = captions.add_caption(image, ["a" * 100_000])
  (hostile,) = captions.add_caption(image, ["\x00\n\u202e\U0001f600\ud7ff", ""])
  assert endless.shape[0] < 1000 and hostile.shape[0] < 1000
