"""Two supervisors of one run exclude each other; a record tells of the run."""

import json
import pathlib
import subprocess
import threading

import pytest

from launch.pod import exits, lease
from tests.launch.pod import fake_cloud

Exit = exits.Exit


class Storage:
  """`gcloud storage` in memory, with preconditions.

  Attributes:
    objects: Generation and text of each object.
    loses: The number of next uploads whose answer is lost.
    refusal: What each call raises; or None.
  """

  dry_run = False

  def __init__(self):
    self.settings = fake_cloud.settings()
    self.objects: dict[str, tuple[int, str]] = {}
    self.loses = 0
    self.refusal: exits.Failure | None = None
    self.count = 0
    self._lock = threading.Lock()

  def call(self, *words: str) -> subprocess.CompletedProcess[str]:
    with self._lock:
      if self.refusal:
        raise self.refusal
      return subprocess.CompletedProcess(words, 0, *self._answer(words[1:]))

  def _answer(self, words) -> tuple[str, str]:
    if words[0] == "cp":
      generation = self.objects.get(words[2], (0, ""))[0]
      for word in words:
        wanted = word.removeprefix("--if-generation-match=")
        if wanted != word and int(wanted) != generation:
          raise exits.Failure(Exit.BUSY, "HTTPError 412")
      self.count += 1
      text = pathlib.Path(words[1]).read_text()
      self.objects[words[2]] = (self.count, text)
      if self.loses:
        self.loses -= 1
        raise exits.Failure(Exit.BUSY, "HTTPError 412: tried twice")
      return "", f"Copying\nCreated: {words[2]}#{self.count}\n"
    url = words[2] if words[0] == "objects" else words[1]
    if url not in self.objects:
      raise exits.Failure(Exit.ABSENT, "no such object")
    generation, text = self.objects[url]
    if words[0] == "rm":
      del self.objects[url]
    return (str(generation) if words[0] == "objects" else text), ""

  @property
  def record(self) -> dict:
    url = lease.url(self.settings, "state.json")
    return json.loads(self.objects[url][1])


@pytest.fixture
def storage(monkeypatch):
  monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.01)
  monkeypatch.setattr(lease, "STALE_SECONDS", 0.4)
  return Storage()


def slowly(monkeypatch):
  """No renewal but those that a test makes."""
  monkeypatch.setattr(lease, "RENEWAL_SECONDS", 1e6)


def test_a_second_supervisor_leaves_a_run_that_has_one(storage, monkeypatch):
  monkeypatch.setattr(lease, "STALE_SECONDS", 8.0)  # Longer than any hiccup.
  with lease.Lease(storage):
    with pytest.raises(exits.Failure, match="supervises this run"):
      lease.Lease(storage).__enter__()


def test_the_lease_of_a_killed_supervisor_is_taken_over(storage, monkeypatch):
  slowly(monkeypatch)
  killed = lease.Lease(storage)
  killed.__enter__()
  with lease.Lease(storage) as held:
    assert storage.record["owner"] == held.record.owner
    # It was only slow: its next write tells it, and the end writes nothing.
    with pytest.raises(exits.Failure, match="taken over"):
      killed.renew()
    with pytest.raises(exits.Failure, match="taken over"):
      killed.sleep(0)
    killed.__exit__(None, None, None)
    assert storage.record["owner"] == held.record.owner
    held.renew()


def test_of_two_that_start_at_once_one_holds_the_lease(storage, monkeypatch):
  slowly(monkeypatch)
  one, other = lease.Lease(storage), lease.Lease(storage)
  for each in (one, other):
    each.require_free()
  one.renew()
  with pytest.raises(exits.Failure, match="taken over"):
    other.renew()


def test_an_answer_that_is_lost_loses_no_lease(storage, monkeypatch):
  slowly(monkeypatch)
  with lease.Lease(storage) as held:
    storage.loses = 1
    held.renew()
    held.renew()
    held.sleep(0)


def test_a_bucket_that_does_not_answer_for_a_while_is_survived(storage):
  with lease.Lease(storage) as held:
    storage.refusal = exits.Failure(Exit.NETWORK, "no network")
    held.sleep(0.1)
    storage.refusal = None
    before = storage.count
    while storage.count < before + 2:
      held.sleep(0.01)


def test_a_request_to_stop_reaches_its_supervisor_alone(storage):
  with lease.Lease(storage) as held:
    lease.put(storage, lease.STOP, held.record.owner)
    with pytest.raises(lease.Stopped):
      held.sleep(60)
    held.record.exit_code = 75
  assert storage.record["exit_code"] == 75
  lease.put(storage, lease.STOP, held.record.owner)
  with lease.Lease(storage) as held:
    held.sleep(0.1)


def test_the_record_keeps_log_and_costs_of_earlier_supervisors(storage):
  with lease.Lease(storage) as held:
    held.record.slices = {"2026-01-01T00:00:00Z": ("us-east1-d", 2.0)}
    held.emit(lease.logging.makeLogRecord({"msg": "a line"}))
    held.record.exit_code = 0
  with pytest.raises(exits.Failure), lease.Lease(storage) as held:
    assert held.record.log[0].endswith("a line")
    raise exits.Failure(Exit.QUOTA, "too small")
  assert storage.record["exit_code"] == Exit.QUOTA
  assert storage.record["slices"]["2026-01-01T00:00:00Z"][1] == 2.0
  record, _ = lease.read(storage)
  assert record and "ended with exit code 80; too small" in str(record)


def test_a_crash_leaves_the_lease_to_grow_stale(storage):
  with pytest.raises(ZeroDivisionError), lease.Lease(storage):
    raise ZeroDivisionError
  assert storage.record["exit_code"] is None


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "{", "\x1b"])
def test_an_object_that_is_no_record_is_named(storage, text):
  url = lease.url(storage.settings, "state.json")
  storage.objects[url] = (1, text)
  with pytest.raises(exits.Failure, match="no record"):
    lease.read(storage)


def test_no_character_of_the_workdir_is_expanded():
  settings = fake_cloud.settings(WORKDIR="gs://my-bucket/a[1]*/b?#2")
  url = lease.url(settings, "x")
  assert url == "gs://my-bucket/a%5B1%5D%2A/b%3F%232.supervisor/x"
