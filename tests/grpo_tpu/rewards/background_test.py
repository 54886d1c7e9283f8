"""Completions are scored while others decode, and score the same."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from grpo_tpu.rewards import scoring
from grpo_tpu.rollout.sampler import Samples
from tests.grpo_tpu import conftest, scripted

pytestmark = pytest.mark.usefixtures("quick_compile")
NUM_COMPLETIONS, NUM_TOKENS = 4, 12
ASKED = (0, 1, 2)  # Of the script: their answers are numbers.


class Tailed(scripted.ScriptedSampler):
  """A network samples; the completions of all prompts but the last have one
  token.
  """

  tiny: conftest.Tiny

  def sample(self, params, prompts, key, *, poll, on_finished, **_):
    count = len(prompts.problems)
    limits = np.ones((count, NUM_COMPLETIONS), int)
    limits[-1] = NUM_TOKENS

    def decode(ids):
      decode_row = self.tokenizer.decode
      return {i: [decode_row(row) for row in rows] for i, rows in ids.items()}

    completions, report = self.tiny.sampled(
      self.tiny.prompts(count),
      np.arange(count),
      key,
      num_completions=NUM_COMPLETIONS,
      max_new_tokens=NUM_TOKENS,
      min_new_tokens=NUM_TOKENS,
      chunk_tokens=1,
      row_limits=limits,
      mesh=self.mesh,
      poll=poll,
      on_finished=lambda ids, cut: on_finished(decode(ids), cut),
    )
    return Samples(completions, None, report.scalars(self.mesh))


@pytest.fixture
def run(tiny, tmp_path):
  tokenizer = scripted.make_tokenizer(tmp_path)
  run = scripted.make_run(tokenizer, {}, sampler=Tailed)
  run.sampler.tiny = tiny
  rewards = dataclasses.replace(
    run.config.rewards,
    custom=("tests.grpo_tpu.rewards.user_rewards:of_problem",),
    custom_weights=(1.0,),
    num_workers=0,
  )
  config = dataclasses.replace(run.config, rewards=rewards)
  yield dataclasses.replace(run, config=config)
  scoring.close()


def test_finished_completions_are_scored_while_others_decode(run, monkeypatch):
  """And the metrics tell for how long."""
  handed_out, begun = threading.Event(), threading.Event()
  start = scoring.start

  def told(*arguments, **options):
    finish = start(*arguments, **options)
    return lambda: begun.set() or finish()

  def poll():
    # However busy this machine, a payment that was asked for gets its turn.
    if not handed_out.is_set():
      handed_out.set()
    else:
      assert begun.wait(60)

  monkeypatch.setattr(scoring, "start", told)
  batches = scripted.batches_of(
    run.tokenizer, batch_size=len(ASKED), indices=ASKED
  )
  found = run.collect(batches, jax.random.key(0), poll=poll)
  scalars = found.metrics
  overlap = scalars["perf/reward_overlap_seconds"]
  assert 0 < overlap <= scalars["perf/rollout_seconds"]
  answers = [float(scripted.SCRIPT[i][1]) for i in ASKED]
  assert scalars["reward/of_problem_mean"] == pytest.approx(np.mean(answers))
  lengths = found.batch.completion_mask.sum(-1)
  np.testing.assert_array_equal(
    lengths, [[1] * NUM_COMPLETIONS] * 2 + [[NUM_TOKENS] * NUM_COMPLETIONS]
  )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_async_rewards_of_a_whole_step_wait_together(tmp_path, num_workers):
  """64 rows of 8 prompts; each call ends when 32 have met, whatever group."""
  run = scripted.make_run(scripted.make_tokenizer(tmp_path), {})
  run = dataclasses.replace(
    run,
    config=dataclasses.replace(
      run.config,
      rewards=dataclasses.replace(
        run.config.rewards,
        custom=("tests.grpo_tpu.rewards.async_rewards:by_32",),
        custom_weights=(1.0,),
        num_workers=num_workers,
        timeout_seconds=60.0,
        max_concurrent=32,
        max_retries=0,
      ),
      rollout=dataclasses.replace(run.config.rollout, num_generations=8),
    ),
  )
  run.sampler.settings = run.config.rollout
  indices = [i for i in scripted.ASKED if scripted.SCRIPT[i][0] != "list"][:8]
  batches = scripted.batches_of(run.tokenizer, batch_size=8, indices=indices)
  found = run.collect(batches, jax.random.key(0))
  assert found.batch.completion_mask.shape[:2] == (8, 8)
  assert found.metrics["reward/by_32_errors"] == 0
  assert found.metrics["reward/by_32_mean"] == 1
  scoring.close()
