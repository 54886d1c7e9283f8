"""The record of a run's supervisor in the bucket, next to the workdir.

One object is the lease, the state and the log. The supervisor writes it once a
minute, if nobody else has. Another machine may take over only after it has seen
the same generation for a while: the clocks of machines are never compared.
"""

import dataclasses
import json
import logging
import pathlib
import re
import socket
import tempfile
import threading
import time
import urllib.parse
import uuid
from typing import Any

from launch.pod import cost, gcloud
from launch.pod import settings as pod_settings
from launch.pod.exits import Exit, Failure, ignore

RENEWAL_SECONDS = 60.0
STALE_SECONDS = 240.0
STOP = "stop"  # The object that asks the supervisor to stop the run.
_RECORD = "state.json"


class Stopped(Exception):
  """`stop` asks the supervisor to end the run."""


def url(settings: pod_settings.Settings, name: str) -> str:
  """An object next to the workdir, without characters that gcloud expands."""
  path = f"{settings.workdir.partition('//')[2]}.supervisor/{name}"
  return f"gs://{urllib.parse.quote(path)}"


def put(cloud: gcloud.Gcloud, name: str, text: str, *flags: str) -> int:
  """Writes an object; returns its generation."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, name)
    path.write_text(text, encoding="utf-8")
    words = ("storage", "cp", str(path), url(cloud.settings, name), *flags)
    result = cloud.call(*words, "--print-created-message")
  created = re.search(r"^Created: .*#(\d+)\s*$", result.stderr, re.MULTILINE)
  return int(created[1]) if created else 0


@dataclasses.dataclass
class Record:
  """The state of a supervisor."""

  owner: str  # A random name.
  machine: str
  exit_code: int | None = None  # None if it is at work, or was killed.
  # The zone and the hours of each slice, by creation time.
  slices: dict[str, tuple[str, float]] = dataclasses.field(default_factory=dict)
  log: list[str] = dataclasses.field(default_factory=list)

  def note(self, zone: str, create_time: str) -> None:
    """Notes the age of a slice; its time is empty if there is none."""
    if create_time:
      life = (zone, cost.hours_since(create_time))
      self.slices = {**self.slices, create_time: life}

  def __str__(self) -> str:
    end = f"ended with exit code {self.exit_code}"
    state = "at work" if self.exit_code is None else end
    return "; ".join([f"supervisor on {self.machine}: {state}", *self.log[-1:]])


def read(cloud: gcloud.Gcloud) -> tuple[Record | None, int]:
  """The record and its generation; None and 0 if there is none."""
  if not cloud.settings.bucket or cloud.dry_run:
    return None, 0
  name = url(cloud.settings, _RECORD)
  words = ("storage", "objects", "describe", name)
  try:
    with ignore(Exit.ABSENT):
      described = cloud.call(*words, "--format=value(generation)")
      text = cloud.call("storage", "cat", name).stdout
      return Record(**json.loads(text)), int(described.stdout)
  except (TypeError, ValueError) as error:
    message = f"{name} is no record of a supervisor ({error}); delete it."
    raise Failure(Exit.GCLOUD, message) from error
  return None, 0


class Lease(logging.Handler):
  """Holds the record while a supervisor works; use as a context manager."""

  def __init__(self, cloud: gcloud.Gcloud):
    super().__init__()
    self._cloud = cloud
    self.record = Record(uuid.uuid4().hex, socket.gethostname())
    self._generation = 0
    self._is_written = threading.Lock()
    self._end = threading.Event()
    self._reason: Exception | None = None  # Why the supervisor must end.
    self._thread = threading.Thread(target=self._renew_often, daemon=True)

  def emit(self, record: logging.LogRecord) -> None:
    """Keeps a line of the log."""
    now = time.strftime("%FT%TZ", time.gmtime(record.created))
    log = [*self.record.log, f"{now} {record.getMessage()}"]
    self.record.log = log[-500:]

  def require_free(self) -> None:
    """Waits until the record is stale; fails if its owner is at work."""
    found, self._generation = read(self._cloud)
    if found is None:
      return
    is_killed = found.exit_code is None
    if not is_killed or found.machine != self.record.machine:
      self._take_stop()  # It was meant for another supervisor.
    self.record.slices, self.record.log = found.slices, found.log
    if is_killed:
      logging.info("Watching if %r supervises this run.", found.machine)
      for _ in range(8):
        time.sleep(STALE_SECONDS / 8)
        if read(self._cloud)[1] != self._generation:
          raise Failure(Exit.BUSY, f"{found.machine} supervises this run.")

  def __enter__(self) -> "Lease":
    while True:
      try:
        self.require_free()
        self.renew()
        break
      except Failure as failure:
        if failure.exit not in (Exit.NETWORK, Exit.UNAVAILABLE):
          raise
        logging.warning("%s\nThe next attempt is in 30 s.", failure)
        time.sleep(30)
    logging.getLogger().addHandler(self)
    self._thread.start()
    return self

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any):
    self._end.set()
    self._thread.join()
    logging.getLogger().removeHandler(self)
    if isinstance(error, KeyboardInterrupt):
      error = Failure(Exit.INTERRUPTED, "Interrupted.")
    if isinstance(error, Failure):
      self.record.exit_code = error.exit
      self.record.log.append(str(error))
    try:
      self.renew()
    except Failure as failure:
      logging.warning("The bucket does not know of the end: %s", failure)

  def renew(self) -> None:
    """Writes the record, if nobody else has written it since the last time."""
    with self._is_written:
      flag = f"--if-generation-match={self._generation}"
      text = json.dumps(dataclasses.asdict(self.record))
      try:
        self._generation = put(self._cloud, _RECORD, text, flag)
      except Failure as failure:
        if failure.exit != Exit.BUSY:
          raise
        # The answer to a write of our own may have been lost.
        found, generation = read(self._cloud)
        if found is None or found.owner != self.record.owner:
          message = "Another supervisor has taken over this run."
          self._reason = Failure(Exit.BUSY, message)
          raise self._reason from failure
        self._generation = generation

  def _renew_often(self) -> None:
    while not self._reason and not self._end.wait(RENEWAL_SECONDS):
      try:
        self.renew()
        if self._take_stop():
          self._reason = Stopped()
      except Failure as failure:
        logging.warning("The lease was not renewed: %s", failure)

  def _take_stop(self) -> bool:
    """True if `stop` has asked for the end, which is then forgotten."""
    with ignore(Exit.ABSENT):
      self._cloud.call("storage", "rm", url(self._cloud.settings, STOP))
      return True
    return False

  def sleep(self, seconds: float) -> None:
    """Sleeps; raises `Stopped` or a failure if the supervisor must end."""
    self._thread.join(seconds)  # It ends early if there is a reason.
    if self._reason:
      raise self._reason
