"""A run compiles what it needs before its second step, and no more."""

import pytest

from tests.e2e import conftest

pytestmark = pytest.mark.e2e


def test_no_step_after_the_second_compiles_anything(program, drawn, tmp_path):
  """Prompts of several padded lengths, and rows that end at different tokens.

  With a reference to be scored, evaluations on the way, and rows that move.
  """
  run = conftest.Run(
    program,
    tmp_path / "workdir",
    "--config=configs/smoke.py",
    f"--config.data.dir={drawn}",
    # Given twice, the buckets would add up.
    *(x for x in conftest.TINY if "prompt_buckets" not in x),
    "--config.train.num_steps=32",
    "--config.data.prompts_per_step=2",
    "--config.train.microbatch_bundles=2",
    "--config.data.prompt_buckets=(36,40,44,64)",
    "--config.rollout.max_new_tokens=10",
    "--config.rollout.chunk_tokens=3",
    # A policy that knows nothing seldom stops by itself.
    "--config.rollout.stop_strings=('a','e','o','t','1','2')",
    "--config.eval.every_steps=13",
    "--config.objective.beta=0.01",
    "--config.samples.every_steps=0",
  ).start()
  compiled = run.column("perf/compilations")[2:]
  assert len(compiled) == 30 and not any(compiled), compiled
  padded = run.column("rollout/padded_prompt_length")
  assert len(set(padded)) >= 2 < len(padded), padded
  assert len(set(run.column("perf/compactions"))) > 1
