"""Evaluations look at a run and never move it."""

import functools
import json

import jax
import numpy as np
import pytest

from configs import smoke
from data_pipelines import dataset
from grpo_tpu.config.schema import Config
from grpo_tpu.train import trainer
from tests.grpo_tpu.conftest import mesh_of

pytestmark = pytest.mark.usefixtures("quick_compile")
NUM_SAMPLES = 4


@functools.cache
def config_of(folder: str, num_samples: int = NUM_SAMPLES) -> Config:
  values = smoke.get_config()
  values.update_from_flattened_dict(
    {
      "data.synthetic.num_problems": 40,
      "data.synthetic.kinds": ("color",),
      "data.prompt_buckets": (44,),
      "data.prompts_per_step": 4,
      "train.microbatch_bundles": 4,
      "rollout.num_generations": NUM_SAMPLES,
      "rollout.max_new_tokens": 2,
      "rollout.pictures_per_shard": 4,
      "rewards.length": 0.5,
      "rewards.gate_heuristics": False,
      "eval.sets": (
        ("geo", f"{folder}/data", "train"),
        ("more", f"{folder}/data", "eval"),
      ),
      "samples.every_steps": 1,
      "eval.num_problems": 4,
      "eval.batch_size": 4,
      "eval.num_samples": num_samples,
    }
  )
  return Config.from_config_dict(values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
  return str(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def data(folder) -> dataset.Dataset:
  config = config_of(folder)
  return dataset.open_dataset(
    config.data, config.model_inputs, folder, for_training=True
  )


@jax.jit
def nudge(state, batch, frozen, teacher_embedding):
  """In the place of an update, which takes long to compile: moves all."""
  amount = (batch.completion_ids * batch.advantages[..., None]).sum() * 1e-4
  params = jax.tree.map(lambda x: x * (1 + amount), state.params)
  metrics = {"loss": amount, "tokens": 1.0, "skipped_updates": 0.0}
  return state.replace(params=params), metrics


def run(config, data, *, is_evaluated):
  """The lines, samples and parameters of three steps, and the evaluations."""
  mesh = mesh_of()
  with jax.set_mesh(mesh):
    parts = trainer.Trainer(config, data, mesh)
    parts.learner.update = nudge
    state, lines, samples, evaluations = parts.init(), [], [], []
    parts.write_samples = lambda step, found: samples.append(
      (step, [x.columns for x in found])
    )
    for step in range(1, 4):
      batch, metrics = parts.collect(state, step)
      state, updated = parts.update(state, parts.score(state, batch))
      lines.append(jax.device_get(metrics | updated))
      if is_evaluated:
        evaluations.append(parts.evaluate(state)[0])
    return lines, samples, jax.device_get(state), evaluations


def exact(line):
  """The numbers of a line that no clock decides, with every digit."""
  kept = {k: x for k, x in line.items() if not k.startswith("perf/")}
  return json.dumps({k: float(x) for k, x in kept.items()})


@pytest.fixture(scope="module")
def evaluated(folder, data):
  return run(config_of(folder), data, is_evaluated=True)


def test_two_sets_and_four_samples_leave_every_number_as_it_is(
  evaluated, folder, data
):
  lines, samples, state, evaluations = evaluated
  wanted = run(config_of(folder), data, is_evaluated=False)
  assert list(map(exact, lines)) == list(map(exact, wanted[0]))
  assert repr(samples) == repr(wanted[1])
  assert all(len(found) == 16 for _, found in samples)
  jax.tree.map(np.testing.assert_array_equal, state, wanted[2])
  assert len(set(map(exact, lines))) == len(evaluations) == 3


def test_each_set_has_all_metrics_under_its_name(evaluated):
  metrics = evaluated[3][-1]
  names = [
    *("accuracy", "format", "reward", "completion_length"),
    *("truncated_fraction", "mean_at_4", "pass_at_1", "pass_at_4"),
  ]
  for name in names:
    assert {f"eval/{name}{x}" for x in ("", "/geo", "/more")} <= set(metrics)
  # The same problems, greedily completed by the same parameters.
  assert metrics["eval/reward"] == metrics["eval/reward/more"]
