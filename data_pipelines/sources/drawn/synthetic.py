"""Synthetic problems with exact answers, in MathVista's schema.

Problem `i` of a set is a pure function of the settings and `i`.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipelines import records
from data_pipelines.sources.drawn import drawing, scenes
from data_pipelines.validation import (
  at_least,
  check_fields,
  interval,
  one_of,
  require,
)

_SCENE_OF = {kind: scene for scene in scenes.SCENES for kind in scene.kinds}
KINDS = tuple(_SCENE_OF)
# `metadata.source` starts with this, then names the kind.
SOURCE = "synthetic/"
# Every 16th problem asks something else about the image before it.
_REPEAT_EVERY = 16


@dataclass(frozen=True)
class Spec:
  """The settings of a set of synthetic problems.

  Attributes:
    num_problems: Number of problems; all are drawn into memory, some thousand
      a second, at a few kB each.
    seed: Random seed of the set.
    difficulty: A higher one has more objects, colors and distractors, larger
      values and more varied wording.
    kinds: The kinds of problems, each equally often.
    image_size: Side of the square image, in pixels.
    multi_choice_share: Share of the number questions that have options.
      Questions whose answer is a word always have them.
    min_options: Fewest options of a multiple-choice question.
    max_options: Most options; fewer where a question has fewer possible
      answers.
  """

  num_problems: int = field(metadata=interval("[1, 1000000]", 10_000))
  seed: int = field(metadata=at_least(0))
  difficulty: int = field(metadata=interval(f"[1, {len(drawing.LEVELS)}]", 1))
  kinds: tuple[str, ...] = field(metadata=one_of(KINDS))
  image_size: int = field(metadata=interval("[32, 1024]", 96))
  multi_choice_share: float = field(metadata=interval("[0, 1]", 0.2))
  min_options: int = field(metadata=interval("[2, 8]", 2))
  max_options: int = field(metadata=interval("[2, 8]", 8))

  def __post_init__(self):
    check_fields(self)
    rule = f"be one or more of {', '.join(KINDS)}"
    require(bool(self.kinds), "kinds", self.kinds, rule, "")
    rule = f"be at most max_options ({self.max_options})"
    holds = self.min_options <= self.max_options
    require(holds, "min_options", self.min_options, rule, "")


def problems(spec: Spec) -> Iterator[records.Problem]:
  """All problems of the set, in order."""
  return (problem(spec, index) for index in range(spec.num_problems))


def problem(spec: Spec, index: int) -> records.Problem:
  """Problem `index` of the set, independent of all other draws."""
  rng, kind = _plan(spec, index)
  scene = _SCENE_OF[kind]
  canvas = drawing.make_canvas(
    rng, size=spec.image_size, difficulty=spec.difficulty
  )
  question = scene.ask(canvas, kind)
  choices = _options(question, spec, rng)
  if choices:
    question = question._replace(answer_type="text", unit="", precision=-1)
  png = io.BytesIO()
  canvas.image.save(png, "PNG", compress_level=1)
  result = records.Problem(
    pid=f"synthetic-{spec.seed}-{index:06d}",
    question=question.text,
    choices=choices,
    unit=question.unit,
    precision=question.precision,
    question_type="multi_choice" if choices else "free_form",
    answer_type=question.answer_type,
    image_path=f"images/{index}.png",
    images=(png.getvalue(),),
    answer=question.answer,
    solution=question.solution,
    metadata={
      **scenes.LABELS[scene.name],
      "grade": "elementary school",
      "img_height": spec.image_size,
      "img_width": spec.image_size,
      "language": "english",
      "source": f"{SOURCE}{kind}",
      "split": "synthetic",
    },
  )
  return replace(result, query=records.official_query(result))


def _plan(spec: Spec, index: int) -> tuple[np.random.Generator, str]:
  """The generator that draws the image, and the kind of question."""
  if index % _REPEAT_EVERY == _REPEAT_EVERY - 1:
    rng, kind = _plan(spec, index - 1)
    related = set(_SCENE_OF[kind].kinds) - {kind}
    siblings = [other for other in spec.kinds if other in related]
    if siblings:
      return rng, siblings[index // _REPEAT_EVERY % len(siblings)]
  rng = np.random.default_rng([spec.seed, spec.difficulty, index])
  return rng, spec.kinds[int(rng.integers(len(spec.kinds)))]


def _options(
  question: scenes.Question, spec: Spec, rng: np.random.Generator
) -> tuple[str, ...]:
  """The options in random order; () where the answer is written out."""
  if not question.pool:
    return ()
  if question.answer_type != "text" and rng.random() >= spec.multi_choice_share:
    return ()
  count = int(rng.integers(spec.min_options, spec.max_options + 1))
  others = rng.permutation(len(question.pool))[: count - 1]
  options = [question.answer, *(question.pool[i] for i in others)]
  return tuple(options[i] for i in rng.permutation(len(options)))
