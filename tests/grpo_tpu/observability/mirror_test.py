"""A bucket gets what a run writes: whole, in time, and whatever happens."""

import os
import random
import threading

import pytest

from data_pipelines.text import untrusted
from grpo_tpu.observability import json_lines, mirror, sample_files

WORKDIR = "gs://bucket/runs/one"


@pytest.fixture
def store(bucket_here, monkeypatch, tmp_path):
  """The objects of the bucket, which is tried again at once if it fails."""
  monkeypatch.setenv("HOME", str(tmp_path))
  quick = {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"}
  monkeypatch.setattr(mirror, "_RETRIES", quick)
  monkeypatch.setattr(mirror, "_SECONDS_AFTER_ERROR", 0.02)
  monkeypatch.setattr(mirror, "_SECONDS_TO_CLOSE", 0.3)
  return bucket_here.store


def contents(store):
  """The bytes of the workdir's objects by name."""
  prefix = "runs/one/"
  return {
    name.removeprefix(prefix): bytes(blob.data)
    for (_, name), blob in store.objects.copy().items()
    if name.startswith(prefix)
  }


class Dying:
  """The store of a process that is killed before one of its requests."""

  def __init__(self, files, num_requests):
    self._store, self._left = files._store, num_requests

  def write(self, *args):
    if not self._left:
      raise ValueError("this process is dead")
    self._left -= 1
    return self._store.write(*args)


def take_steps(files, first, last, resume_step):
  """Writes steps as a run does; yields after each."""
  lines = json_lines.JsonLines(
    files.folder / "metrics.jsonl", resume_step=resume_step
  )
  samples = sample_files.SampleFiles(
    files.folder / "samples", resume_step=resume_step
  )
  try:
    for step in range(first, last + 1):
      samples.write(step, [{"pid": f"p{step}", "completion": "x" * step}])
      samples.flush()
      lines.append({"step": step, "train/loss": 1 / (1 + step)})
      yield step
  finally:
    lines.close()
    samples.close()


def steps_in(content):
  return [untrusted.parse_json(x, "")["step"] for x in content.splitlines()]


def check(found, saved):
  """Whole lines, to the checkpoint's at least, and the samples of all."""
  kept = steps_in(found.get("metrics.jsonl", b""))
  assert kept == [*range(len(kept))]
  assert saved is None or saved in kept
  names = {sample_files._name(step) for step in kept}
  assert names <= {name.rpartition("/")[2] for name in found}


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_anywhere_ends_as_the_unbroken_one(store, seed):
  """Its machines are gone each time; only the bucket is left."""
  unbroken = mirror.Mirror("gs://bucket/runs/two")
  assert [*take_steps(unbroken, 0, 12, None)] == [*range(13)]
  unbroken.close()
  draw, saved, num_kills = random.Random(seed), None, 0
  while saved != 12:
    files = mirror.Mirror(WORKDIR)
    files.fetch()
    files._store = Dying(files, draw.randrange(1, 9))
    first = 0 if saved is None else saved + 1
    try:
      for step in take_steps(files, first, 12, saved):
        if step % 3 == 0:
          files.wait(0)
          saved = step
        check(contents(store), saved)
    except TimeoutError:
      num_kills += 1
      check(contents(store), saved)
    files._is_closed.set()
  assert num_kills > 1
  expected = {
    name.removeprefix("runs/two/"): bytes(blob.data)
    for (_, name), blob in store.objects.items()
    if name.startswith("runs/two/")
  }
  assert len(expected) == 14 and contents(store) == expected


def test_an_outage_is_counted_and_caught_up_with(store, caplog):
  files = mirror.Mirror(WORKDIR)
  for step in take_steps(files, 0, 5, None):
    if step == 1:
      files.wait(60)
      store.set_faults(outage=True)
    if step == 4:
      with pytest.raises(TimeoutError, match="runs/one lacks the newest"):
        files.wait(0.1)
      assert steps_in(contents(store)["metrics.jsonl"]) == [0, 1]
      assert files.failures > 0
      store.set_faults()
      files.wait(60)
      assert steps_in(contents(store)["metrics.jsonl"]) == [*range(5)]
  files.close()
  assert steps_in(contents(store)["metrics.jsonl"]) == [*range(6)]
  assert not files.folder.exists()
  assert "runs/one lags behind" in caplog.text


def test_a_run_that_may_no_longer_write_copies_nothing(store):
  def refuse():
    raise ValueError("another run has the lease")

  files = mirror.Mirror(WORKDIR)
  files.before_copy = refuse
  (files.folder / "metrics.jsonl").write_text('{"step": 1}\n')
  with pytest.raises(TimeoutError, match="another run has the lease"):
    files.wait(0)
  assert not contents(store)


def test_the_end_of_a_run_waits_no_longer_than_it_says(store, caplog):
  files = mirror.Mirror(WORKDIR)
  store.set_faults(outage=True)
  (files.folder / "stacks.0.txt").write_text("where it hangs")
  files.close()
  # People find here what the bucket lacks.
  assert f"could not be copied from {files.folder}" in caplog.text
  assert (files.folder / "stacks.0.txt").read_text() == "where it hangs"


def test_only_what_has_changed_is_copied_and_what_is_gone_is_deleted(store):
  files = mirror.Mirror(WORKDIR)
  list(take_steps(files, 0, 9, None))
  files.wait(60)
  # Of all samples of a run, a disk may have no room.
  assert sum(x.stat().st_size for x in files.folder.glob("samples/*")) == 0
  files.close()
  resumed = mirror.Mirror(WORKDIR)
  resumed.fetch()
  # Their names are enough to remove them.
  assert all(x.stat().st_size == 0 for x in resumed.folder.glob("samples/*"))
  before = len(store.requests)
  list(take_steps(resumed, 7, 7, 6))
  resumed.close()
  methods = [request.split()[0] for request in store.requests[before:]]
  # The metrics, the sample of step 7; those of steps 8 and 9.
  assert sorted(methods) == ["DELETE"] * 2 + ["POST"] * 2
  found = contents(store)
  assert steps_in(found["metrics.jsonl"]) == [*range(8)]
  assert sorted(x for x in found if x.startswith("samples/")) == [
    f"samples/{sample_files._name(step)}" for step in range(8)
  ]
  assert all(x.startswith(b"PAR1") for n, x in found.items() if "samples" in n)


def test_nothing_unfinished_reaches_the_bucket(store, tmp_path, monkeypatch):
  log = tmp_path / "log"
  log.write_text("step 1/2\n")
  monkeypatch.setenv("GRPO_TPU_LOG", str(log))
  files = mirror.Mirror(WORKDIR)
  names = [".trace/plugins/profile/x.pb", ".trace/half.pb"]
  names += ["samples/.step_1.tmp", "a.tmp"]
  for name in names:
    path = files.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("half a")
  (files.folder / "metrics.jsonl").write_text('{"step": 1}\n{"st')
  (files.folder / ".trace/plugins").rename(files.folder / "plugins")
  files.close()
  found = contents(store)
  name = f"logs/worker-0-{os.uname().nodename}.log"
  assert found.pop(name) == b"step 1/2\n"
  assert found == {
    "metrics.jsonl": b'{"step": 1}\n',
    "plugins/profile/x.pb": b"half a",
  }


@pytest.mark.parametrize(
  "name",
  [
    "samples/step_../../escaped.parquet",
    "samples/step_1.parquet/../../../escaped",
    "metrics.jsonl/../../escaped",
    "events.out.tfevents./../escaped",
  ],
)
def test_a_name_in_the_bucket_leads_to_no_other_folder(store, name):
  store.put("bucket", f"runs/one/{name}", b"hostile", "text/plain", {})
  files = mirror.Mirror(WORKDIR)
  files.fetch()
  assert not [x for x in files.folder.rglob("*") if x.is_file()]
  files.close()


def test_a_workdir_on_a_disk_has_no_scratch_folder_and_no_thread(tmp_path):
  before = threading.active_count()
  files = mirror.Mirror(tmp_path)
  assert files.folder == tmp_path and threading.active_count() == before
  files.fetch()
  files.wait(0)
  files.close()
  assert tmp_path.exists() and not any(tmp_path.iterdir())


def test_workers_with_a_shared_disk_leave_their_logs_there(
  tmp_path, monkeypatch
):
  log = tmp_path / "log"
  log.write_text("step 1/2\n")
  monkeypatch.setenv("GRPO_TPU_LOG", str(log))
  mirror.Mirror(tmp_path / "run").close()
  (copied,) = (tmp_path / "run" / "logs").iterdir()
  assert copied.read_text() == "step 1/2\n"
