"""What TensorBoard shows of a run, read as TensorBoard reads it."""

import numpy as np
import pytest

pytestmark = pytest.mark.e2e

CURVES = (
  "rollout/reward",
  "rollout/accuracy",
  "rollout/completion_length",
  "rollout/truncated_fraction",
  "train/entropy",
  "train/kl",
  "train/clip_fraction",
  "perf/tokens_per_second",
)


def events_of(run):
  """Everything in the event files of a workdir, by tag."""
  from tensorboard.backend.event_processing import event_accumulator

  events = event_accumulator.EventAccumulator(
    str(run.workdir), size_guidance={"tensors": 0}
  )
  return events.Reload()


def points(events, tag: str) -> list[tuple[int, float]]:
  from tensorboard.util import tensor_util

  return [
    (event.step, tensor_util.make_ndarray(event.tensor_proto).item())
    for event in events.Tensors(tag)
  ]


def test_the_curves_are_those_of_the_metrics_file(unbroken):
  events = events_of(unbroken)
  curves = events.PluginTagToContent("scalars")
  assert set(CURVES) <= set(curves)
  assert set(curves) == set().union(*unbroken.rows()) - {"step"}
  for name in CURVES:
    written = [
      (row["step"], float(np.float32(row[name])))
      for row in unbroken.rows()
      if name in row
    ]
    assert len(written) == 6
    assert points(events, name) == written


def test_no_step_is_drawn_twice_after_a_kill(resumed):
  events = events_of(resumed)
  for name in CURVES:
    steps = [step for step, _ in points(events, name)]
    assert steps == sorted(set(steps))
    assert steps[-1] == 6


def test_there_are_completions_to_read_and_pictures_to_see(unbroken):
  events = events_of(unbroken)
  texts, images = map(events.PluginTagToContent, ("text", "images"))
  for split, steps in (("train", [2, 4, 6]), ("eval", [0, 3, 6])):
    text, image = (f"samples/{split}/0/{sort}" for sort in ("text", "image"))
    assert text in texts
    assert image in images
    for tag in (text, image):
      assert [event.step for event in events.Tensors(tag)] == steps
    words = events.Tensors(text)[0].tensor_proto.string_val[0].decode()
    assert "right answer:" in words
    # Width, height, then the picture.
    _, _, png = events.Tensors(image)[0].tensor_proto.string_val
    assert png.startswith(b"\x89PNG")
