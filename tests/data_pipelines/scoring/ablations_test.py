"""Other images for the same questions: only the image changes."""

import collections
import dataclasses
import io

import numpy as np
import PIL.Image
import pytest

from data_pipelines import images
from data_pipelines.scoring import ablations
from tests.grpo_tpu import scripted
from tests.grpo_tpu.scripted import EVERY, UNREADABLE, Source

COUNT = len(EVERY)


class Problems:
  """A list of problems as a source."""

  def __init__(self, problems):
    self.problems = problems

  def __len__(self):
    return len(self.problems)

  def __getitem__(self, index, /):
    return self.problems[index]


def ablated(kind, source=None, *, num_problems=COUNT, seed=0):
  source = Source(EVERY) if source is None else source
  return ablations.source(kind, source, num_problems=num_problems, seed=seed)


def images_of(source, indices):
  return [images.decode(source[i].images[0]) for i in indices]


READABLE = [i for i in EVERY if i != UNREADABLE]


@pytest.mark.parametrize("kind", ablations.KINDS)
def test_only_the_image_changes(kind):
  source, real = ablated(kind), Source(EVERY)
  assert len(source) == len(real)
  for index in READABLE:
    got = dataclasses.replace(source[index], images=())
    assert got == dataclasses.replace(real[index], images=())


@pytest.mark.parametrize("kind", ablations.KINDS)
def test_unreadable_problems_stay_unreadable(kind):
  broken = scripted.make_problem(0)
  broken = dataclasses.replace(broken, images=(broken.images[0][:40],))
  whole = [scripted.make_problem(i) for i in (1, 2, 3)]
  source = ablated(kind, Problems([*whole, broken]), num_problems=4)
  with pytest.raises(ValueError, match="undecodable"):
    images.decode(source[3].images[0])
  with pytest.raises(ValueError, match="truncated"):
    ablated(kind)[UNREADABLE]


def test_a_removed_image_is_plain_grey_of_the_same_shape():
  for image, real in zip(
    images_of(ablated("removed"), READABLE),
    images_of(Source(EVERY), READABLE),
    strict=True,
  ):
    assert image.shape == real.shape == (7, 9, 3)
    assert (image == 128).all()


@pytest.mark.parametrize("seed", range(5))
def test_each_image_goes_to_one_other_problem(seed):
  real = [image.tobytes() for image in images_of(Source(EVERY), READABLE)]
  got = [
    image.tobytes()
    for image in images_of(ablated("shuffled", seed=seed), READABLE)
  ]
  assert collections.Counter(got) == collections.Counter(real)
  assert all(a != b for a, b in zip(got, real, strict=True))


def test_only_the_seed_determines_the_shuffle():
  def shuffled(seed):
    return [ablated("shuffled", seed=seed)[i].images[0] for i in READABLE]

  assert shuffled(3) == shuffled(3)
  assert len({tuple(shuffled(seed)) for seed in range(5)}) == 5


def test_only_the_asked_problems_are_shuffled():
  source, real = ablated("shuffled", num_problems=4), Source(EVERY)
  asked = {real[i].images[0] for i in range(4)}
  assert {source[i].images[0] for i in range(4)} == asked
  assert source[5].images[0] == real[5].images[0]


def several(counts):
  """Problems of so many different images each."""
  pool = [scripted.make_problem(i).images[0] for i in READABLE]
  problems = []
  for index, count in enumerate(counts):
    shown, pool = tuple(pool[:count]), pool[count:]
    problem = scripted.make_problem(READABLE[index])
    problems.append(dataclasses.replace(problem, images=shown))
  return Problems(problems)


@pytest.mark.parametrize("kind", ablations.KINDS)
def test_every_image_of_a_problem_is_replaced_and_a_text_stays(kind):
  real = several((2, 0, 3, 1))
  other = ablated(kind, real, num_problems=4)
  assert [len(x.images) for x in map(other.__getitem__, range(4))] == [
    *(2, 0, 3, 1)
  ]
  before, after = (
    [images.pixel_hash(images.decode(x)) for i in range(4) for x in s[i].images]
    for s in (real, other)
  )
  assert all(a != b for a, b in zip(before, after, strict=True))
  if kind == "shuffled":
    assert sorted(before) == sorted(after)


@pytest.mark.parametrize("seed", range(20))
def test_a_derangement_changes_every_key(seed):
  rng = np.random.default_rng(seed)
  keys = [str(x) for x in rng.integers(0, 4, 30)]
  keys += ["largest"] * 30  # As many as all the others: there is one way left.
  keys = [keys[i] for i in rng.permutation(60)]
  givers = ablations.derangement(keys, seed)
  assert sorted(givers) == list(range(60))
  assert all(keys[to] != keys[giver] for to, giver in enumerate(givers))


def test_derangements_differ_between_seeds_and_reach_every_index():
  keys = list("abcdef")
  found = np.array([ablations.derangement(keys, seed) for seed in range(200)])
  for place in range(6):
    assert set(found[:, place]) == set(range(6)) - {place}


def encoded(image, kind):
  file = io.BytesIO()
  image.save(file, kind)
  return file.getvalue()


def test_another_encoding_is_not_another_image():
  image = PIL.Image.new("RGB", (9, 7), (9, 9, 9))
  files = [encoded(image, kind) for kind in ("PNG", "BMP")]
  problems = [
    dataclasses.replace(scripted.make_problem(i), images=(file,))
    for i, file in enumerate(files)
  ]
  with pytest.raises(
    ValueError, match=r"eval.ablations.*2 of 2 images are the same"
  ):
    ablated("shuffled", Problems(problems), num_problems=2)


@pytest.mark.parametrize("keys", [[], ["a"], ["a", "b", "a"]])
def test_keys_without_a_derangement_are_refused(keys):
  with pytest.raises(ValueError, match=r"^eval.ablations .*must.*leave"):
    ablations.derangement(keys, 0)
