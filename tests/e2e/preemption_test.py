"""A notice of preemption: every host saves the same, and the run goes on."""

import json

import pytest

from tests.e2e import hosts
from tests.e2e.conftest import ON_HOSTS, summary

pytestmark = pytest.mark.multiprocess

# Ten seconds, four more in which the fault waits for all to hear of it, and
# what a busy machine needs.
SOON = 30


@pytest.fixture(scope="session")
def unbroken(start, tmp_path_factory):
  """By settings: what two hosts write that nothing befalls."""
  ends = {}

  def of(*settings):
    if settings not in ends:
      workdir = tmp_path_factory.mktemp("unbroken") / "run"
      end = start(workdir, *settings).end()
      assert end.codes == [0, 0], end.logs
      ends[settings] = workdir
    return ends[settings]

  return of


def lines_but_for_time(workdir):
  rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [
    json.dumps(
      {
        name: value
        for name, value in row.items()
        if not name.startswith(("perf/", "checkpoint/"))
      }
    )
    for row in rows
  ]


def samples(workdir):
  return {x.name: x.read_bytes() for x in (workdir / "samples").iterdir()}


@pytest.mark.parametrize(
  ("point", "num_iterations", "saved"),
  [
    # The next common poll is in the same rollout.
    ("term@2:1:decode", 1, "00000001"),
    # Or at the border of the next step,
    pytest.param("term@2:1:update", 1, "00000002", marks=pytest.mark.nightly),
    # or between two updates,
    pytest.param("term@2:0:update", 2, "00000001.1", marks=pytest.mark.nightly),
    # or in the evaluation, with all updates done.
    pytest.param("term@3:1:update", 1, "00000002.1", marks=pytest.mark.nightly),
  ],
  ids=["in a rollout", "between steps", "between updates", "in an evaluation"],
)
def test_a_notice_to_one_host_stops_both_at_one_point_and_nothing_is_lost(
  start, unbroken, tmp_path, record_property, point, num_iterations, saved
):
  """Exit code 75 on both, and the run goes on as if it had not been."""
  settings = (f"--config.train.num_iterations={num_iterations}",)
  workdir = tmp_path / "run"
  both = start(workdir, *settings, fault=point)
  both.wait_for("strikes", host=int(point[7]))
  end = both.end()
  assert end.codes == [75, 75], end.logs
  record_property("seconds", end.seconds)
  assert max(end.seconds) < SOON
  words = summary(workdir)
  assert words["exit_code"] == 75
  assert words["newest_checkpoint"].endswith(f"checkpoints/{saved}")
  assert sum(words["goodput"].values()) == pytest.approx(1)
  for log in end.logs:
    assert log.count("(exit code 75): preempted") == 1
    assert f"checkpoints/{saved}\n" in log
  again = start(workdir, *settings).end()
  assert again.codes == [0, 0], again.logs
  expected = unbroken(*settings)
  assert lines_but_for_time(workdir) == lines_but_for_time(expected)
  assert samples(workdir) == samples(expected)
  words = summary(workdir)
  assert words["exit_code"] == 0
  assert words["goodput"]["restart"] > 0
  assert sum(words["goodput"].values()) == pytest.approx(1)


def test_a_run_of_one_process_hears_the_notice_too(
  program, drawn, tmp_path, record_property
):
  workdir = tmp_path / "run"
  given = [*ON_HOSTS[:-1], f"--config.data.dir={drawn}"]
  given += [f"--workdir={workdir}", "--config.train.num_steps=1000"]
  given += ["--config.eval.every_steps=0"]
  one = hosts.Hosts(
    [given], program.environment, tmp_path / "logs", fault="term@2:0:update"
  )
  one.wait_for("strikes", host=0)
  end = one.end()
  assert end.codes == [75], end.logs
  record_property("seconds", end.seconds)
  assert max(end.seconds) < SOON
  assert summary(workdir)["newest_checkpoint"].endswith("checkpoints/00000002")
