import ast
import collections
import dataclasses
import functools
import io
import re

import numpy as np
import pytest
from PIL import Image

from data_pipelines import images, records
from data_pipelines.sources.drawn import drawing, scenes, synthetic
from data_pipelines.verifier import verify

SPEC = synthetic.Spec(
  num_problems=300,
  seed=0,
  difficulty=2,
  kinds=synthetic.KINDS,
  image_size=48,
  multi_choice_share=0.25,
  min_options=2,
  max_options=8,
)


def drawn(**changes):
  return list(synthetic.problems(dataclasses.replace(SPEC, **changes)))


def kind_of(problem):
  return problem.metadata["source"].removeprefix("synthetic/")


def pixels(problem):
  return np.asarray(Image.open(io.BytesIO(problem.images[0])))


def is_painted(image, color):
  return (image == drawing.COLORS[color]).all(axis=-1)


def num_blobs(mask):
  """Counts connected regions."""
  mask, count = mask.copy(), 0
  while mask.any():
    count += 1
    stack = [tuple(np.argwhere(mask)[0])]
    while stack:
      y, x = stack.pop()
      if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and mask[y, x]:
        mask[y, x] = False
        stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
  return count


@pytest.mark.parametrize("image_size", [32, 96])
@pytest.mark.parametrize("difficulty", range(1, 6))
def test_every_problem_is_valid_and_its_answer_right(difficulty, image_size):
  for problem in drawn(difficulty=difficulty, image_size=image_size):
    records.validate(problem)
    shape = images.decode(problem.images[0]).shape
    assert shape == (image_size, image_size, 3)
    answer = problem.answer
    assert verify.verify(f"<answer>{answer}</answer>", problem).correct
    assert problem.pid and problem.metadata["img_width"] == image_size


def test_a_problem_depends_on_its_settings_and_index_alone():
  problems = drawn()
  backwards = [synthetic.problem(SPEC, i) for i in reversed(range(300))]
  assert backwards[::-1] == problems
  assert drawn(num_problems=100) == problems[:100]


@pytest.mark.parametrize("change", [{"seed": 1}, {"difficulty": 3}])
def test_another_seed_or_difficulty_draws_other_images(change):
  ours = {problem.images[0] for problem in drawn()}
  assert not ours & {problem.images[0] for problem in drawn(**change)}


def test_the_set_covers_the_schema():
  problems = drawn(num_problems=600)
  assert {kind_of(problem) for problem in problems} == set(synthetic.KINDS)
  seen = {(p.answer_type, p.precision) for p in problems}
  assert seen == {
    ("text", -1),
    ("integer", -1),
    ("list", -1),
    ("float", 1),
    ("float", 2),
  }
  assert {p.unit for p in problems} == {"", "$", "kg", "minutes"}
  assert {len(p.choices) for p in problems} == {0, *range(2, 9)}


def test_images_differ_but_for_those_asked_about_twice():
  problems = drawn(num_problems=800, difficulty=1)
  by_image = collections.defaultdict(list)
  for problem in problems:
    by_image[problem.images[0]].append(problem)
  repeated = [group for group in by_image.values() if len(group) > 1]
  assert 0.03 < len(repeated) / len(problems) < 0.07  # At most one in 16.
  for group in repeated:
    assert len({problem.question for problem in group}) == len(group) == 2


def test_asked_for_directly_a_number_has_no_options():
  problems = drawn(kinds=("color", "count"), multi_choice_share=0.0)
  assert {(kind_of(p), p.question_type) for p in problems} == {
    ("color", "multi_choice"),
    ("count", "free_form"),
  }
  assert len({p.images[0] for p in problems}) == len(problems)
  every = drawn(kinds=("count",), multi_choice_share=1.0)
  assert {p.question_type for p in every} == {"multi_choice"}


def test_options_stay_within_their_bounds_and_differ():
  for problem in drawn(kinds=("color",), min_options=3, max_options=5):
    assert 3 <= len(problem.choices) <= 5
    assert len(set(problem.choices)) == len(problem.choices)


@pytest.mark.parametrize("difficulty", [1, 5])
@pytest.mark.parametrize("kind", synthetic.KINDS)
def test_no_constant_answer_does_well(kind, difficulty):
  """Nor does a constant letter: the limit is twice the share of a guess."""
  problems = drawn(
    kinds=(kind,), difficulty=difficulty, min_options=4, max_options=4
  )
  counts = collections.Counter(problem.answer for problem in problems)
  assert max(counts.values()) / len(problems) < 2 / len(counts) + 0.1
  letters = collections.Counter(
    problem.choices.index(problem.answer)
    for problem in problems
    if len(problem.choices) == 4
  )
  if letters.total() > 100:
    assert max(letters.values()) / letters.total() < 0.4


def test_counted_shapes_are_those_that_the_image_shows():
  # At difficulty 1 all shapes have one color without shades.
  for problem in drawn(kinds=("count",), difficulty=1, num_problems=60):
    image = pixels(problem)
    shown = [num_blobs(is_painted(image, color)) for color in drawing.COLORS]
    assert sum(shown) == int(problem.answer)


@pytest.mark.parametrize("image_size", [32, 96])
def test_the_named_color_is_the_one_painted(image_size):
  for problem in drawn(
    kinds=("color",), difficulty=1, image_size=image_size, num_problems=60
  ):
    image = pixels(problem)
    painted = [c for c in drawing.COLORS if is_painted(image, c).any()]
    assert painted == [problem.answer]


@pytest.mark.parametrize("image_size", [32, 96])
def test_bars_stand_in_proportion_to_their_values(image_size):
  for problem in drawn(
    kinds=("bar_value", "bar_max", "bar_difference"),
    difficulty=1,
    image_size=image_size,
    num_problems=90,
  ):
    image = pixels(problem)
    heights = {
      color: is_painted(image, color).any(axis=1).sum()
      for color in drawing.COLORS
      if is_painted(image, color).any()
    }
    # Values go up to 5; a bar has whole units and a base line.
    unit = (image_size - 4) // 5
    values = {color: (height - 1) / unit for color, height in heights.items()}
    named = re.findall("|".join(drawing.COLORS), problem.question)
    if kind_of(problem) == "bar_max":
      assert problem.answer == max(values, key=values.__getitem__)
    elif kind_of(problem) == "bar_value":
      assert int(problem.answer) == values[named[0]]
    else:
      assert int(problem.answer) == values[named[0]] - values[named[1]] > 0


def test_rows_of_a_table_are_listed_from_top_to_bottom():
  """Reads the digits of the image by the same bitmap."""
  for problem in drawn(kinds=("table_list",), difficulty=1, image_size=48):
    ink = (pixels(problem) == drawing.INK).all(axis=-1)[:, 48 // 2 - 1 :]
    read = []
    for row in np.split(ink, 3):
      ys, xs = np.nonzero(row)
      digit = row[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
      scale = digit.shape[0] // 5
      for value in range(1, 6):
        glyph = np.asarray(drawing._glyph(str(value), scale)) > 0
        glyph = glyph[:, glyph.any(axis=0)]
        if np.array_equal(glyph, digit):
          read.append(value)
    assert read == ast.literal_eval(problem.answer)


def test_black_dots_are_counted_among_all():
  for problem in drawn(kinds=("dot_black", "dot_total"), num_problems=60):
    image = pixels(problem)
    ink = (image == drawing.INK).all(axis=-1)
    white = (image == drawing.WHITE).all(axis=-1)
    dots, rings = num_blobs(ink | white), num_blobs(white)
    asked = dots if kind_of(problem) == "dot_total" else dots - rings
    assert int(problem.answer) == asked


def test_worked_solutions_end_in_the_answer():
  kinds = ("bar_difference", "table_sum", "dot_total", "dot_fraction")
  for problem in drawn(kinds=kinds):
    working, result = problem.solution.removesuffix(".").split(" = ")
    assert result == problem.answer
    value = eval(working.replace("x", "*"))  # A sum that we wrote ourselves.
    assert abs(value - float(result)) < 0.005 + 1e-9


def test_no_fraction_lies_halfway_between_two_decimals():
  for difficulty in range(1, 6):
    for problem in drawn(kinds=("dot_fraction",), difficulty=difficulty):
      part, whole = re.match(r"(\d+) / (\d+) =", problem.solution).groups()
      assert 200 * int(part) % (2 * int(whole)) != int(whole)


def test_difficulty_adds_things_to_see():
  few = functools.partial(drawn, num_problems=100)
  colors = [
    len({p.answer for p in few(kinds=("color",), difficulty=d)})
    for d in range(1, 6)
  ]
  counts = [
    max(int(p.answer) for p in few(kinds=("count",), difficulty=d))
    for d in range(1, 6)
  ]
  assert colors == [4, 5, 6, 7, 8]
  assert counts == [4, 5, 7, 9, 12]


def test_wording_is_plain_at_low_difficulty():
  def wordings(difficulty):
    names = "|".join(drawing.COLORS) + "|" + "|".join(drawing.SHAPES)
    problems = drawn(kinds=("color",), difficulty=difficulty)
    return {re.sub(names, "_", problem.question) for problem in problems}

  assert wordings(1) == {"What color is the _?"}
  assert len(wordings(5)) == 3


@pytest.mark.parametrize(
  "change, name",
  [
    ({"num_problems": 0}, "num_problems"),
    ({"seed": -1}, "seed"),
    ({"difficulty": 6}, "difficulty"),
    ({"kinds": ()}, "kinds"),
    ({"kinds": ("colour",)}, "kinds"),
    ({"kinds": ("color", "color")}, "kinds"),
    ({"image_size": 31}, "image_size"),
    ({"multi_choice_share": 1.5}, "multi_choice_share"),
    ({"min_options": 1}, "min_options"),
    ({"min_options": 5, "max_options": 4}, "min_options"),
    ({"max_options": 9}, "max_options"),
  ],
)
def test_a_wrong_setting_is_named_with_its_rule(change, name):
  with pytest.raises(ValueError, match=rf"^{name} \(.*\) must be"):
    dataclasses.replace(SPEC, **change)


def test_every_kind_belongs_to_one_scene():
  kinds = [kind for scene in scenes.SCENES for kind in scene.kinds]
  assert len(set(kinds)) == len(kinds)
