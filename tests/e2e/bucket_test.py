"""A run whose workdir and data lie in a bucket is the run on a disk."""

import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.e2e import browser, buckets
from tests.e2e.conftest import TINY, Run, summary
from tests.e2e.event_files_test import (
  asked,
  colourful,
  events_of,
  points,
  script,
)
from tests.e2e.resume_test import assert_same, lines_but_for_time, samples

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

KILLS = 20
# Every second step is saved, and a start comes a few steps further at most.
LONG = ("--config.train.num_steps=50", *buckets.WAITING)


@pytest.fixture
def bucket_run(bucket, program, drawn, tmp_path):
  """Makes a tiny run on the drawn problems, all of it in the bucket."""

  runs = []

  def new(*settings: str) -> buckets.BucketRun:
    data = buckets.upload(bucket, drawn, "data")
    run = buckets.BucketRun(
      bucket,
      program.environment,
      tmp_path / "machines",
      *("--config=configs/smoke.py", *TINY, f"--config.data.dir={data}"),
      *settings,
    )
    runs.append(run)
    return run

  yield new
  for run in runs:
    run.close()


@pytest.fixture(scope="session")
def long(new_run) -> Run:
  """Fifty steps on a disk, in one go."""
  return new_run(*LONG).start()


def local_copy(run: buckets.BucketRun, tmp_path: pathlib.Path) -> Run:
  name = f"copy-{time.monotonic_ns()}"
  copied = object.__new__(Run)
  copied.workdir = run.copy(tmp_path / name)
  return copied


def curves(run: Run) -> dict[str, list[tuple[int, float]]]:
  """The points in the event files, but for what a clock decides."""
  events = events_of(run)
  return {
    tag: points(events, tag)
    for tag in events.PluginTagToContent("scalars")
    if not tag.startswith(("perf/", "checkpoint/", "goodput/"))
  }


def assert_same_everywhere(run: Run, other: Run) -> None:
  """Numbers, completions and curves, and the newest checkpoint's arrays."""
  assert_same(run, other)
  assert curves(run) == curves(other)
  newest = summary(other.workdir)["newest_checkpoint"].rpartition("/")[2]
  found, wanted = (
    arrays(str(x.workdir / "checkpoints" / newest)) for x in (run, other)
  )
  assert found.keys() == wanted.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(found[name], array)


def arrays(checkpoint: str) -> dict[str, np.ndarray]:
  """The state of a checkpoint, as Orbax's own reader gives it."""
  import jax
  import orbax.checkpoint as ocp
  from etils import epath

  with ocp.StandardCheckpointer() as reader:
    state = reader.restore(epath.Path(checkpoint) / "state")
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def assert_complete(run: Run, whole: Run, newest: int) -> None:
  """All is there up to a saved step, and is what the unbroken run wrote."""
  lines, wanted = lines_but_for_time(run), lines_but_for_time(whole)
  assert len(lines) > newest
  assert lines == wanted[: len(lines)]
  files, whole_files = samples(run), samples(whole)
  saved = {
    name for name in whole_files if int(re.findall(r"\d+", name)[0]) <= newest
  }
  assert saved <= files.keys()
  assert all(files[name] == whole_files[name] for name in files)
  drawn, whole_curves = curves(run), curves(whole)
  for tag, wanted_points in whole_curves.items():
    due = [point for point in wanted_points if point[0] <= newest]
    if due:
      assert drawn[tag][: len(due)] == due, tag


def test_a_bucket_that_is_gone_for_two_minutes_stops_nothing(
  bucket_run, long, tmp_path
):
  run = bucket_run(*LONG)
  store = run.server.store
  start = run.start(STEP_SECONDS="4")
  start.wait_until(lambda: start.step() >= 5)
  before = start.step()
  store.set_faults(outage=True)
  time.sleep(120)
  after = start.step()
  store.set_faults()
  assert start.end() == [0], start.log()[-4000:]
  assert after >= before + 10
  assert_same_everywhere(local_copy(run, tmp_path), long)


def test_readers_see_the_run_while_it_goes_on(
  bucket_here, bucket_run, long, tmp_path
):
  """Orbax's own by gs://, and TensorBoard in a browser."""
  import orbax.checkpoint as ocp

  run = bucket_run(*LONG)
  start = run.start(STEP_SECONDS="4")
  start.wait_until(lambda: run.checkpoints())
  (newest, *_) = run.checkpoints()[::-1]
  place = f"{run.workdir}/checkpoints"
  found = arrays(f"{place}/{newest:08}")
  assert len(found) > 10
  options = ocp.CheckpointManagerOptions(
    step_format_fixed_length=8, read_only=True
  )
  with ocp.CheckpointManager(place, options=options) as manager:
    assert manager.latest_step() >= newest
  log = tmp_path / "tensorboard.txt"
  with log.open("wb") as file:
    process = subprocess.Popen(
      [sys.executable, "-m", "tensorboard.main", f"--logdir={run.workdir}"]
      + ["--host=127.0.0.1", "--port=0", "--load_fast=false"]
      + ["--reload_interval=5"],
      stdout=file,
      stderr=subprocess.STDOUT,
    )
  try:
    start.wait_until(lambda: re.search(r"http://\S+/", log.read_text()))
    found = re.search(r"http://\S+/", log.read_text())
    assert found
    address = found[0]

    def shown():
      runs = asked(address, "data/plugin/scalars/tags")
      if not any("rollout/reward" in tags for tags in runs.values()):
        return []
      answer = asked(
        address, "data/plugin/scalars/scalars", run=".", tag="rollout/reward"
      )
      return [(int(step), value) for _, step, value in answer]

    start.wait_until(lambda: len(shown()) >= newest)
    seen = shown()
    wanted = points(events_of(long), "rollout/reward")
    assert seen == wanted[: len(seen)]
    program = browser.find()
    if program:
      with browser.page(program, tmp_path / "browser.txt") as page:
        page.open(f"{address}#custom_scalars", width=1280, height=900)
        curves = "all('.match-list-entry').map(x => x.innerText).join(' ')"
        drawn = r"/\brollout\/reward \(\.\)/"
        page.wait_for(script(f"return {drawn}.test({curves})"))
        # The first chart, of evaluations, may have a single point.
        charts = script("return all('vz-line-chart2').map(box)")
        while not any(
          colourful(page.screenshot(), box) > 100 for box in page.value(charts)
        ):
          assert start.is_running(), "no curve is drawn"
          time.sleep(0.5)
    assert start.is_running(), "it was to be looked at while it ran"
  finally:
    process.kill()
    process.wait()
    start.kill()


def test_a_workdir_is_one_run_s(bucket_run, long, tmp_path):
  """A second start is refused; one after a kill waits until it may."""
  run = bucket_run(*LONG)
  first = run.start(STEP_SECONDS="4")
  first.wait_until(lambda: first.step() >= 1)
  second = run.start()
  (code,) = second.end()
  assert code != 0
  assert "is writing there" in second.log()
  assert first.is_running()
  first.wait_until(lambda: run.checkpoints())
  first.kill()
  third = run.start()
  begin = time.monotonic()
  third.wait_until(lambda: third.step() >= 1)
  assert time.monotonic() - begin < 60 + 60
  assert third.end() == [0]
  assert_same_everywhere(local_copy(run, tmp_path), long)


def test_a_run_that_stood_still_leaves_the_workdir_to_the_next(
  bucket_run, long, tmp_path
):
  run = bucket_run(*LONG)
  first = run.start(STEP_SECONDS="4")
  first.wait_until(lambda: 2 in run.checkpoints())
  (process,) = first.processes
  process.send_signal(signal.SIGSTOP)
  second = run.start(STEP_SECONDS="4")
  second.wait_until(lambda: second.step() >= 4)
  process.send_signal(signal.SIGCONT)
  assert first.end() != [0]
  assert "Another run has taken" in first.log()
  assert second.end() == [0]
  assert_same_everywhere(local_copy(run, tmp_path), long)


def test_refused_and_cut_requests_change_nothing(bucket_run, long, tmp_path):
  run = bucket_run(*LONG)
  run.server.store.set_faults(busy=0.05, cut=0.01)
  start = run.start()
  start.wait_until(lambda: start.step() >= 20)
  start.kill()
  run.finish()
  run.server.store.set_faults()
  assert_same_everywhere(local_copy(run, tmp_path), long)


def test_twenty_kills_leave_no_trace(bucket_run, long, tmp_path):
  """Of each, the bucket alone is left: between two puts, or at any time."""
  run, rng = bucket_run(*LONG), random.Random(0)
  for number in range(KILLS):
    start = run.start(STEP_SECONDS="1")
    kind = rng.choice(["start", "step", "step", "put", "put", "put"])
    if kind == "put":
      run.kill_at_put(start, rng.randint(1, 60))
    else:
      if kind == "step":
        start.wait_until(lambda start=start: start.step() >= 1)
      time.sleep(rng.uniform(0, 12 if kind == "step" else 15))
      assert start.kill()
    newest = max(run.checkpoints(), default=0)
    print(f"{number:2} {kind:4} newest checkpoint {newest}", flush=True)
    if newest:
      assert_complete(local_copy(run, tmp_path), long, newest)
    if number % 5:
      run.release()
  run.finish()
  assert_same_everywhere(local_copy(run, tmp_path), long)
