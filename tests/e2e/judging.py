"""Data that teach a tiny model to judge, made from drawn problems."""

import base64
import json
import pathlib
import random
from collections.abc import Iterator

from data_pipelines import records
from data_pipelines.sources.drawn import synthetic
from data_pipelines.verifier import verify
from grpo_tpu.rewards import judge_templates

# Short, because a tiny model reads it.
TEMPLATE = "{question}\nReference: {answer}\nResponse:\n{response}\nyes or no?"
_JUNK = ("Question", " the", "er", "ow", "<answer>", "?", "ed", " is", "low")


def problems(number: int, seed: int) -> Iterator[records.Problem]:
  """Drawn problems with a picture, as those of configs/smoke.py."""
  spec = synthetic.Spec(
    num_problems=number,
    seed=seed,
    difficulty=1,
    kinds=("bar_max", "color"),
    image_size=48,
    multi_choice_share=0.0,
    min_options=3,
    max_options=4,
  )
  return synthetic.problems(spec)


def responses(problem: records.Problem, rng: random.Random) -> tuple[str, str]:
  """A right and a wrong response, as a tiny policy writes them."""
  others = [x for x in problem.choices if x != problem.answer]
  found: dict[bool, str] = {}
  while len(found) < 2:
    answer = rng.choice([problem.answer, problem.answer, *others])
    parts = ["<answer>", answer, "</answer>"]
    if rng.random() < 0.3:
      parts.insert(rng.randrange(4), rng.choice(_JUNK))
    if rng.random() < 0.15:
      del parts[rng.randrange(len(parts))]
    text = "".join(parts)
    found.setdefault(verify.verify(text, problem).correct, text)
  return found[True], found[False]


def write_demonstrations(
  path: pathlib.Path, template: judge_templates.Template, number: int, seed: int
) -> None:
  """Writes questions to a judge, each with the verifier's verdict.

  Of the two responses to a problem one is asked about, by turns.
  """
  rng = random.Random(seed)
  with path.open("w") as file:
    for index, problem in enumerate(problems(number, seed)):
      response = responses(problem, rng)[index % 2]
      asked = template.prompt(problem) + template.visible(response)
      row = {
        "pid": problem.pid,
        "question": asked + template.after,
        "image": base64.b64encode(problem.images[0]).decode(),
        # As a pair, because a lone "yes" would be read as a gold.
        "chosen": ("yes", "no")[index % 2],
        "rejected": ("no", "yes")[index % 2],
      }
      file.write(json.dumps(row) + "\n")
