"""What one host suffers, all of them end by, soon and not in silence."""

import json
import signal

import pytest

from tests.e2e.conftest import summary

pytestmark = pytest.mark.multiprocess

# A busy machine needs some of it; a barrier of JAX's would take minutes.
SOON = 30


def test_an_exception_on_one_host_is_logged_and_ends_both(
  start, tmp_path, record_property
):
  hosts = start(tmp_path / "run", fault="raise@2:1:update")
  hosts.wait_for("strikes", host=1)
  end = hosts.end()
  assert end.codes[1] == 1 and end.codes[0] != 0, end.logs
  assert max(end.seconds) < SOON
  record_property("seconds", end.seconds)
  assert "RuntimeError: injected: raise@2:1:update" in end.logs[1]
  assert "Stopped at step 1 (exit code 1): RuntimeError" in end.logs[1]
  assert "Checkpoint: " in end.logs[1]


def test_a_host_that_gets_nowhere_shows_its_stacks_and_exits_76(
  start, tmp_path, record_property
):
  workdir = tmp_path / "run"
  hosts = start(
    workdir,
    "--config.distributed.watchdog_seconds=5.0",
    "--config.distributed.watchdog_start_seconds=300.0",
    fault="hang@2:1:update",
  )
  hosts.wait_for("strikes", host=1)
  end = hosts.end()
  assert 76 in end.codes and 0 not in end.codes, end.logs
  assert max(end.seconds) < SOON + 5
  record_property("seconds", end.seconds)
  index = end.codes.index(76)
  assert "(exit code 76): no progress" in end.logs[index]
  stacks = (workdir / f"stacks.{index}.txt").read_text()
  assert "Thread" in stacks and "grpo_tpu/train/" in stacks


@pytest.mark.nightly
@pytest.mark.parametrize("host", [0, 1], ids=["coordinator", "other"])
def test_a_host_that_is_frozen_is_given_up_after_the_heartbeat_time_out(
  start, tmp_path, record_property, host
):
  hosts = start(
    tmp_path / "run",
    "--config.distributed.heartbeat_timeout_seconds=10",
    "--config.train.num_steps=1000",
    "--config.eval.every_steps=0",
  )
  hosts.wait_for("  reward ", host=0)
  hosts.signal(host, signal.SIGSTOP)
  end = hosts.end(without=[host])
  # Of JAX's own, in C++.
  assert end.codes[1 - host] == -signal.SIGABRT, end.logs
  assert end.seconds[1 - host] < 10 + SOON
  record_property("seconds", end.seconds[1 - host])


@pytest.mark.nightly
def test_a_gradient_that_is_not_finite_is_skipped_by_all_and_counted(
  start, tmp_path
):
  workdir = tmp_path / "run"
  hosts = start(
    workdir, "--config.train.max_skipped_updates=2", fault="nan@2:1"
  )
  end = hosts.end()
  assert end.codes == [0, 0], end.logs
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  skipped = [row["train/skipped_updates"] for row in rows[1:]]
  assert skipped == [0, 1, 0, 0]
  # A NaN that had reached the parameters would have stayed.
  assert [row["train/loss"] is None for row in rows[1:]] == [
    *(False, True, False, False)
  ]
  assert summary(workdir)["skipped_updates"] == 1


@pytest.mark.nightly
def test_hosts_that_differ_are_named_with_what_differs(start, tmp_path):
  hosts = start(tmp_path / "run", others=("--config.objective.beta=0.1",))
  end = hosts.end()
  assert end.codes == [64, 64], end.logs
  for log in end.logs:
    assert "host 1 (" in log
    assert "config objective.beta is 0.1, host 0 has None" in log
  assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_the_slow_host_is_named(start, tmp_path):
  workdir = tmp_path / "run"
  end = start(workdir, fault="slow@2:1:save").end()
  assert end.codes == [0, 0], end.logs
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  row = json.loads(lines[3])
  assert row["perf/slowest_host"] == 1
  # Against the median, which of two lies half-way.
  assert row["perf/straggler_seconds"] > 0.5


@pytest.mark.nightly
def test_a_reward_that_always_fails_ends_both_by_its_name(start, tmp_path):
  hosts = start(
    tmp_path / "run",
    "--config.rewards.custom=('tests.grpo_tpu.rewards.user_rewards:misspelt',)",
    "--config.rewards.custom_weights=(1.0,)",
  )
  end = hosts.end()
  assert end.codes == [1, 1], end.logs
  for log in end.logs:
    assert "misspelt" in log and "failed on every one of the last" in log
    assert "user_rewards.py:" in log
