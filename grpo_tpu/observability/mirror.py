"""Copies the files of a run to its workdir, if that is in a bucket.

Nothing can be appended to an object: it appears whole or not at all. So files
grow in a scratch folder on this machine's disk, and a thread copies those that
have changed. An error of the bucket never stops the run: the thread tries
again, and catches up.

References:
  docs/adr/0012-files-are-copied-to-a-bucket-whole.md
"""

import contextlib
import os
import pathlib
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable

import jax
import tensorstore as ts
from absl import logging

from data_pipelines.storage import host_copy, paths

_SECONDS_BETWEEN_COPIES = 30.0
_SECONDS_TO_CLOSE = 60.0
_SECONDS_AFTER_ERROR = 2.0
# A connection may fall silent; the client itself would wait for ever.
_SECONDS_PER_REQUEST = 180.0
# The client's own attempts at a request, for three quarters of a minute.
_RETRIES = {"max_retries": 6, "initial_delay": "1s", "max_delay": "16s"}

# What a resumed run continues, and may remove. A bucket may hold any name.
_RESUMED = re.compile(
  r"metrics\.jsonl|events\.out\.tfevents\.[^/\0]+|samples/step_\d+\.parquet"
)
# Files below it do not change. Once copied they leave an empty file here,
# because all of them may be too large for the disk.
_SAMPLES = "samples/"


class Mirror:
  """The folder in which one process writes, and the thread that copies it.

  For a workdir on a disk, the folder is the workdir and nothing is copied.
  A process that is killed at any point leaves whole files in the bucket.
  `$GRPO_TPU_LOG` names a file anywhere that is copied too, to `logs/`.

  Attributes:
    workdir: On a disk or in a bucket.
    is_remote: True if it is in a bucket.
    folder: The workdir on a disk, or a scratch folder.
    failures: The number of attempts to copy that failed.
    before_copy: Called before each attempt; raises if nothing may be copied.
  """

  def __init__(self, workdir: str | os.PathLike[str]) -> None:
    """Makes a scratch folder for a workdir in a bucket; asks nothing of it."""
    self.workdir, self.failures = os.fspath(workdir), 0
    self.before_copy: Callable[[], None] = lambda: None
    self.is_remote = paths.is_remote(workdir)
    self.folder = pathlib.Path(self.workdir)
    if not self.is_remote:
      return
    # Not in /tmp: nothing may clean it up, and the bucket with it.
    scratch = host_copy.cache_folder("scratch")
    self.folder = pathlib.Path(tempfile.mkdtemp(dir=scratch))
    context = ts.Context({"gcs_request_retries": _RETRIES})
    self._store = ts.KvStore.open(f"{workdir}/", context=context).result()
    # What the bucket has, as it was copied: the states of files by name.
    self._copied: dict[str, tuple[int, ...]] = {}
    self._copying, self._is_closed = threading.Lock(), threading.Event()
    threading.Thread(target=self._copy_at_times, daemon=True).start()

  def fetch(self) -> None:
    """Brings the files of the run that a resumed run continues.

    It needs only the names of samples. What the run then removes here is
    removed in the bucket too.

    Raises:
      ValueError: The bucket does not answer, or refuses.
    """
    if not self.is_remote:
      return
    with self._copying:
      found = [x.decode(errors="replace") for x in self._store.list().result()]
      names = filter(_RESUMED.fullmatch, found)
      reads = {
        name: None if name.startswith(_SAMPLES) else self._store.read(name)
        for name in names
      }
      for name, read in reads.items():
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(read.result().value if read else b"")
        self._copied[name] = _state(path.stat())

  def wait(self, seconds: float) -> None:
    """Copies what was written so far, or raises a TimeoutError at the end."""
    if not self.is_remote:
      for name, log in _log_file().items():
        with contextlib.suppress(OSError):
          paths.make_folder(self.folder / "logs")
          paths.write_whole(self.folder / name, log.read_bytes())
      return
    end = time.monotonic() + seconds
    while error := self._copy():
      if time.monotonic() >= end:
        raise TimeoutError(
          f"{self.workdir} lacks the newest metrics, samples and curves, which "
          f"could not be copied from {self.folder} on this machine: {error}"
        )
      time.sleep(_SECONDS_AFTER_ERROR)

  def close(self) -> None:
    """Waits a minute for the bucket, and removes what could all be copied."""
    try:
      self.wait(_SECONDS_TO_CLOSE)
      if self.is_remote:
        with self._copying:
          self._is_closed.set()
        shutil.rmtree(self.folder, ignore_errors=True)
    except TimeoutError as error:
      logging.error("%s.", error)

  def _copy_at_times(self) -> None:
    seconds = 0.0
    # Large files are copied less often.
    while not self._is_closed.wait(max(_SECONDS_BETWEEN_COPIES, 10 * seconds)):
      start = time.monotonic()
      self._copy()
      seconds = time.monotonic() - start

  def _copy(self) -> str:
    """Copies what has changed; returns the error, if any."""
    try:
      with self._copying:
        if not self._is_closed.is_set():
          self.before_copy()
          self._copy_changes()
      return ""
    except Exception as error:
      self.failures += 1
      text = (str(error).splitlines() or [type(error).__name__])[0]
      words = "%s lags behind: %d attempts to copy to it failed, last: %s"
      if str(self.failures).strip("0") == "1":  # And at ten times the count.
        logging.warning(words, self.workdir, self.failures, text)
      return text

  def _copy_changes(self) -> None:
    """Copies files that have changed, and deletes those that are gone."""
    found = self._files()
    for name in sorted(found, reverse=True):  # Samples before their metrics.
      with contextlib.suppress(FileNotFoundError):  # Deleted meanwhile.
        if self._copied.get(name) != _state(found[name].stat()):
          self._copied[name] = self._copy_file(name, found[name])
    for name in self._copied.keys() - found.keys():
      self._store.write(name, None).result(_SECONDS_PER_REQUEST)
      del self._copied[name]

  def _copy_file(self, name: str, path: pathlib.Path) -> tuple[int, ...]:
    """Copies a file; returns its state before it was read."""
    is_sample = name.startswith(_SAMPLES)
    with path.open("r+b" if is_sample else "rb") as file:
      state = _state(os.fstat(file.fileno()))
      content = file.read()
      if name.endswith(".jsonl"):  # A line may be half written.
        content = content[: content.rfind(b"\n") + 1]
      self._store.write(name, content).result(_SECONDS_PER_REQUEST)
      if is_sample:
        file.truncate(0)
        state = _state(os.fstat(file.fileno()))
    return state

  def _files(self) -> dict[str, pathlib.Path]:
    """The finished files by their names in the workdir."""
    found = {
      path.relative_to(self.folder).as_posix(): path
      for path in self.folder.rglob("[!.]*")
      if path.suffix != ".tmp" and path.is_file()
    }
    return {x: found[x] for x in found if x[0] != "."} | _log_file()


def _log_file() -> dict[str, pathlib.Path]:
  """The log of this process, if a launcher names one, by its name here."""
  log = os.environ.get("GRPO_TPU_LOG")
  # Another machine may continue the run.
  name = f"logs/worker-{jax.process_index()}-{socket.gethostname()}.log"
  return {name: pathlib.Path(log)} if log else {}


def _state(status: os.stat_result) -> tuple[int, ...]:
  """Differs from that of the same file before a change."""
  return status.st_ino, status.st_size, status.st_mtime_ns
