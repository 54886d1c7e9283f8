"""Completions are paid while others decode, and earn what they would later."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from grpo_tpu.rewards import scoring
from grpo_tpu.rl import experience
from grpo_tpu.rl import policy as policies
from tests.grpo_tpu import conftest, scripted

pytestmark = pytest.mark.usefixtures("quick_compile")
NUM_COMPLETIONS, NUM_TOKENS = 4, 12
ASKED = (0, 1, 2)  # Of the script: their answers are numbers.


@dataclasses.dataclass(frozen=True)
class Tailed(scripted.Scripted):
  """A network really samples; all prompts but the last end at one token."""

  tiny: conftest.Tiny

  def sample(self, params, batch, step_key, *, poll, finished, **_):
    count = len(batch.problems)
    limits = np.ones((count, NUM_COMPLETIONS), int)
    limits[-1] = NUM_TOKENS
    completions, report = self.tiny.sampled(
      self.tiny.prompts(count),
      np.arange(count),
      step_key,
      num_completions=NUM_COMPLETIONS,
      max_new_tokens=NUM_TOKENS,
      min_new_tokens=NUM_TOKENS,
      chunk_tokens=1,
      row_limits=limits,
      mesh=self.mesh,
      poll=poll,
      finished=lambda ids: finished(self._read(ids)),
    )
    return policies.Sampled(completions, None, report.scalars(self.mesh))


@pytest.fixture
def tailed(tiny, tmp_path):
  tokenizer = scripted.make_tokenizer(tmp_path)
  plain = scripted.make_policy(tokenizer, {})
  rewards = dataclasses.replace(
    plain.config.rewards,
    custom=("tests.grpo_tpu.rewards.user_rewards:of_problem",),
    custom_weights=(1.0,),
    num_workers=0,
  )
  config = dataclasses.replace(plain.config, rewards=rewards)
  yield Tailed(config, plain.mesh, tokenizer, {}, tiny)
  scoring.close()


def test_what_is_finished_is_paid_while_others_decode(tailed, monkeypatch):
  """And the metrics tell for how long."""
  handed_out, begun = threading.Event(), threading.Event()
  raw_scores = scoring.raw_scores

  def told(completions, problems, config):
    begun.set()
    return raw_scores(completions, problems, config)

  def poll():
    # However busy this machine, a payment that was asked for gets its turn.
    if not handed_out.is_set():
      handed_out.set()
    else:
      assert begun.wait(60)

  monkeypatch.setattr(scoring, "raw_scores", told)
  batches = scripted.batches_of(
    tailed.tokenizer, batch_size=len(ASKED), indices=ASKED
  )
  found = experience.online(
    tailed,
    {},
    iter(batches),
    jax.random.key(0),
    position=0,
    num_samples=0,
    poll=poll,
  )
  scalars = found.scalars
  overlap = scalars["perf/reward_overlap_seconds"]
  assert 0 < overlap <= scalars["perf/rollout_seconds"]
  answers = [float(scripted.SCRIPT[i][1]) for i in ASKED]
  assert scalars["reward/of_problem_mean"] == pytest.approx(np.mean(answers))
  lengths = found.bundles.completion_mask.sum(-1)
  np.testing.assert_array_equal(
    lengths, [[1] * NUM_COMPLETIONS] * 2 + [[NUM_TOKENS] * NUM_COMPLETIONS]
  )
