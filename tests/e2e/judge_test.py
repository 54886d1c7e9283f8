"""A tiny model that is trained to judge says what the verifier says."""

import dataclasses
import pathlib
import random

import jax
import numpy as np
import pytest

from configs import base
from data_pipelines import images, pipeline
from data_pipelines.text import tokenizer as tokens
from data_pipelines.verifier import verify
from grpo_tpu.checkpoint import load
from grpo_tpu.checkpoint.frozen import Frozen
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import sharding
from grpo_tpu.rewards import combination, judge_templates, networks, scoring
from grpo_tpu.rewards.judge import open_judges
from tests.e2e import judging

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

CONFIG = Config.from_config_dict(base.get_config())
PROBLEMS = list(judging.problems(64, seed=7))
RNG = random.Random(5)
TEXTS = [list(judging.responses(problem, RNG)) for problem in PROBLEMS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("judge")


@pytest.fixture(scope="module")
def trained(program, folder) -> pathlib.Path:
  """Learns to answer and to judge, from demonstrations of both."""
  (folder / "judge.txt").write_text(judging.TEMPLATE)
  # The demonstrations of answers have the tag that this file names.
  (folder / "query.jinja").write_text("{{ query }}{# <answer> #}")
  template = judge_templates.open_template(str(folder / "judge.txt"))
  source = folder / "demonstrations.jsonl"
  judging.write_demonstrations(source, template, 12_000, seed=1)
  program.run(
    *("data_pipelines.prepare", f"--source={source}"),
    *(f"--data_dir={folder}/judging", "--unchecked_answers=keep"),
  )
  program.run(
    *("data_pipelines.prepare", "--source=synthetic"),
    *(f"--data_dir={folder}/data", "--num_problems=2000", "--difficulty=1"),
    *("--kinds=bar_max,color", "--image_size=48", "--multi_choice_share=0"),
    *("--min_options=3", "--max_options=4"),
  )
  dirs = ((f"{folder}/data", 0.25), (f"{folder}/judging", 0.75))
  program.run(
    *("grpo_tpu.main", "--config=configs/smoke.py:warm_start"),
    f"--workdir={folder}/run",
    f"--config.data.dirs={dirs}",
    f"--config.data.prompt_template={folder}/query.jinja",
    "--config.data.prompt_buckets=(96,)",
    "--config.train.num_steps=200",
    "--config.eval.every_steps=0",
  )
  return folder / "run"


def verdicts(run, tokenizer, template, problems, weights):
  """Rewards of the host alone and with a judge, and what the judge says."""
  mesh = sharding.make_mesh(
    replica=1, fsdp=1, tensor=1, devices=jax.devices()[:1]
  )
  model = dataclasses.replace(
    CONFIG.model, weights=f"run:{run}", compute_dtype="float32"
  )
  rules = dataclasses.replace(CONFIG.rewards, num_workers=0)
  config = dataclasses.replace(
    rules, judges=((weights, template, 1.0),), judge_when="abstained"
  )
  kept = {"dtype": "float32", "memory": "device", "setting": ""}
  start = Frozen(load.load_merged(model, mesh), mesh, **kept)
  judges = open_judges(
    *(config, model, start, tokens.Tokenizer(tokenizer), mesh),
    longest_prompt=64,
    longest_completion=8,
    bundles_at_a_time=64,
    pan_and_scan=images.WHOLE,
  )
  count = len(problems)
  prompts = pipeline.Batch(
    *[np.zeros(count, np.int32)] * 4,
    valid=np.ones(count, bool),
    problems=tuple(problems),
    completion_ids=None,
    completion_mask=None,
    labels=None,
  )
  completed = networks.Completed(None, None, TEXTS)
  both = combination.Combination(config, judges, lambda rows: rows)
  flat = [x for group in TEXTS for x in group]
  asked = [x for x in problems for _ in range(2)]
  with jax.set_mesh(mesh):
    said = judges[0].start(prompts, completed)()["judge_1"].ravel()
    join = both.start(prompts, completed, np.ones((count, 2), bool))
    found = join(scoring.score(flat, asked, config))
  return scoring.score(flat, asked, rules).total, found.total, said


@pytest.mark.parametrize("weights", ["self", "run"])
def test_a_model_that_learnt_to_judge_pays_where_rules_abstain(
  trained, folder, weights
):
  """Every other problem is one that rules cannot check."""
  problems = [
    dataclasses.replace(x, answer_type="unchecked", question_type="free_form")
    if index % 2
    else x
    for index, x in enumerate(PROBLEMS)
  ]
  weights = f"run:{trained}" if weights == "run" else weights
  alone, judged, said = verdicts(
    *(trained, folder / "data" / "tokenizer.model"),
    *(str(folder / "judge.txt"), problems, weights),
  )
  right = np.array(
    [
      verify.verify(text, problem).correct
      for problem, group in zip(PROBLEMS, TEXTS, strict=True)
      for text in group
    ]
  )
  agreement = np.mean((said > 0.5) == right)
  assert agreement >= 0.9, agreement
  is_open = np.repeat(np.arange(len(problems)) % 2 == 1, 2)
  np.testing.assert_array_equal(judged[~is_open], alone[~is_open])
  gain = judged - alone
  np.testing.assert_allclose(gain[is_open], said[is_open], atol=1e-6)
  assert gain[is_open & right].mean() > gain[is_open & ~right].mean() + 0.7
