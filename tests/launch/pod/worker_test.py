"""The real worker script, in a home folder of its own."""

import hashlib
import os
import pathlib
import shutil
import signal
import subprocess
import tarfile
import time

import pytest

from launch.pod import exits, workers

ROOT = pathlib.Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "launch" / "pod" / "worker.sh"

pytestmark = pytest.mark.skipif(
  not (shutil.which("setsid") and shutil.which("flock")),
  reason="no setsid or no flock here",
)


class Worker:
  """A home folder, and fake programs of a TPU VM."""

  def __init__(self, folder: pathlib.Path):
    self.home = folder / "a home"
    self.state = self.home / "grpo_tpu" / "run"
    self.bin = folder / "bin"
    self.home.mkdir()
    self.bin.mkdir()
    shutil.copy(SCRIPT, self.home / "grpo_tpu_worker.sh")
    self.add("trainer", "exec sleep 60")

  def add(self, name: str, script: str) -> None:
    (self.bin / name).write_text(f"#!/bin/bash\n{script}\n")
    (self.bin / name).chmod(0o755)

  def do(self, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
      ["bash", "grpo_tpu_worker.sh", *words],
      cwd=self.home,
      env={
        "HOME": str(self.home),
        "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
        "GRPO_TPU_PYTHON": str(self.bin / "trainer"),
      },
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=60,
    )

  def send(self, **files: str) -> str:
    """Packs these files for setup; returns the checksum."""
    tree = self.home.parent / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    for name, text in files.items():
      (tree / name).write_text(text)
    archive = self.home / "grpo_tpu_code.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
      packed.add(tree, arcname=".")
    return hashlib.sha256(archive.read_bytes()).hexdigest()

  def status(self) -> workers.Status:
    return workers.Status.parse(self.do("status").stdout)

  def pid(self) -> int:
    return int((self.state / "pid").read_text())


@pytest.fixture
def worker(tmp_path):
  made = Worker(tmp_path)
  assert made.do("setup", "abc", made.send(a="1"), "").returncode == 0
  yield made
  made.do("stop", "1", "kill")


def eventually(claim) -> None:
  until = time.monotonic() + 60
  while not claim():
    assert time.monotonic() < until, "the claim stayed false"
    time.sleep(0.05)


def test_setup_replaces_the_files_and_keeps_the_environment(worker):
  code = worker.home / "grpo_tpu" / "code"
  (code / ".venv").mkdir()
  (code / ".venv" / "made").touch()
  assert worker.do("setup", "def", worker.send(b="2"), "").returncode == 0
  assert not (code / "a").exists()
  assert (code / "b").exists() and (code / ".venv" / "made").exists()
  assert worker.status().commit == "def"


def test_an_archive_with_a_wrong_checksum_is_not_unpacked(worker):
  worker.send(b="2")
  done = worker.do("setup", "def", "0" * 64, "")
  assert done.returncode == 1 and "checksum" in done.stderr
  assert worker.status().commit == "abc"


def test_a_run_has_its_arguments_its_log_and_its_exit_code(worker, tmp_path):
  worker.add("trainer", "printf '%s\\n' \"$@\"; exit 76")
  words = ("--config=a b", "--x=$(touch owned); 'q'", '--y="*"')
  workdir = tmp_path / "the run's"
  assert worker.do("run", str(workdir), "", *words).returncode == 0
  eventually(lambda: worker.status().state == "ended")
  assert worker.status().exit_code == 76
  log = worker.do("logs", "50").stdout.splitlines()
  expected = ["-m", "grpo_tpu.main", *words, f"--workdir={workdir}"]
  at = log.index("-m")
  assert log[at : at + len(expected)] == expected
  assert not list(worker.home.rglob("owned"))


LOG = """\
E1130 08:26:00.044358 140 a.py:20] an error of another run
2026-11-30T09:00:00Z the run starts: 'x'
I1130 08:26:58.744358 140 writer.py:206] step 99/100  reward 0.76  ETA 0:01
I1130 08:26:58.744367 140 writer.py:206] step 100/100  reward 0.8  ETA 0:00
E1130 08:26:59.744367 140 exit_report.py:206] a ([x] y) must be; set a=/x.
W1130 08:26:59.038312 140 exit_report.py:97] Stopped (exit code 64): see above.
W1130 08:26:59.038313 140 exit_report.py:97] Next: fix what the error names
"""


def test_the_status_of_a_run_that_has_ended_says_why(worker, tmp_path):
  (tmp_path / "log").write_text(LOG)
  worker.add("trainer", f"cat '{tmp_path}/log'; exit 64")
  worker.do("run", str(tmp_path), "")
  eventually(lambda: worker.status().state == "ended")
  assert worker.status().details == [
    "step 100/100  reward 0.8  ETA 0:00",
    "a ([x] y) must be; set a=/x.",
    "Stopped (exit code 64): see above.",
    "Next: fix what the error names",
  ]
  worker.add("trainer", "exit 0")
  worker.do("run", str(tmp_path), "")
  eventually(lambda: worker.status().exit_code == 0)
  assert worker.status().details == []


def test_the_status_of_a_run_has_its_progress(worker, tmp_path):
  (tmp_path / "log").write_text(LOG)
  worker.add("trainer", f"cat '{tmp_path}/log'; exec sleep 60")
  worker.do("run", str(tmp_path), "")
  eventually(lambda: worker.status().details)
  assert worker.status().details == ["step 100/100  reward 0.8  ETA 0:00"]


def test_a_run_outlives_the_session_that_started_it(worker, tmp_path):
  worker.do("run", str(tmp_path), "")
  assert os.getsid(worker.pid()) not in (os.getsid(0), worker.pid())
  guard = pathlib.Path(f"/proc/{worker.pid()}/stat").read_text().split()[3]
  os.kill(int(guard), signal.SIGHUP)
  os.kill(int(guard), signal.SIGTERM)  # As a machine that goes down does.
  time.sleep(0.3)
  assert worker.status().state == "running"
  os.kill(worker.pid(), signal.SIGTERM)
  eventually(lambda: worker.status().exit_code == 143)


def test_a_run_without_its_guard_still_runs_and_then_is_lost(worker, tmp_path):
  worker.do("run", str(tmp_path), "")
  guard = pathlib.Path(f"/proc/{worker.pid()}/stat").read_text().split()[3]
  os.kill(int(guard), signal.SIGKILL)
  assert worker.status().state == "running"
  assert worker.do("run", str(tmp_path), "").returncode == exits.Exit.BUSY
  os.kill(worker.pid(), signal.SIGKILL)
  eventually(lambda: worker.status().state == "lost")


def test_a_process_id_from_before_a_restart_is_not_trusted(worker):
  worker.state.mkdir()
  (worker.state / "pid").write_text(f"{os.getpid()}\n")
  (worker.state / "lock").touch()
  assert worker.status().state == "lost"
  assert worker.do("stop", "1").returncode == 0  # And it is not killed.


def test_a_run_that_does_not_end_is_killed_only_on_request(worker, tmp_path):
  worker.add("trainer", "trap '' TERM; while :; do sleep 0.1; done")
  worker.do("run", str(tmp_path), "")
  assert worker.do("stop", "1").returncode == exits.Exit.TIMEOUT
  assert worker.status().state == "running" and worker.status().was_stopped
  assert worker.do("stop", "1", "kill").returncode == 0
  eventually(lambda: worker.status().exit_code == 137)


def test_the_next_run_clears_the_mark_of_stop(worker, tmp_path):
  worker.do("run", str(tmp_path), "")
  assert worker.do("stop", "20").returncode == 0
  assert worker.status().was_stopped and worker.status().exit_code == 143
  worker.do("run", str(tmp_path), "")
  assert not worker.status().was_stopped and worker.status().exit_code is None


@pytest.mark.parametrize("is_mounted", [False, True])
def test_a_bucket_is_mounted_before_anything_is_written_there(
  worker, is_mounted
):
  calls = worker.home / "calls"
  worker.add("sudo", f'printf "%s\\n" "$*" >>"{calls}"')
  worker.add("gcsfuse", "exit 9")
  worker.add("mountpoint", f"exit {int(not is_mounted)}")
  worker.add("trainer", "exit 0")
  worker.do("run", "gs://my-bucket/a run", "")
  folder = worker.home / "grpo_tpu" / "buckets" / "my-bucket"
  assert worker.status().workdir == f"{folder}/a run"
  assert calls.exists() != is_mounted
  if not is_mounted:
    said = calls.read_text()
    assert said.endswith(f" my-bucket {folder}\n") and "gcsfuse" in said


def test_gcsfuse_is_installed_where_it_is_missing(worker):
  if shutil.which("gcsfuse"):
    pytest.skip("this machine has gcsfuse")
  worker.add("sudo", f'printf "%s\\n" "$*" >>"{worker.home}/calls"; exit 1')
  done = worker.do("run", "gs://my-bucket/a", "")
  assert done.returncode == 1 and "WORKDIR on a disk" in done.stderr
  calls = (worker.home / "calls").read_text()
  assert calls == "-n apt-get install --yes --quiet gcsfuse\n"


def test_a_bucket_that_cannot_be_mounted_ends_it(worker):
  worker.add("sudo", "exit 1")
  worker.add("gcsfuse", "exit 1")
  done = worker.do("run", "gs://my-bucket/a", "")
  assert done.returncode == 1 and "could not be mounted" in done.stderr
  assert worker.status().state == "none"


def test_progress_is_read_from_the_workdir(worker, tmp_path):
  workdir = tmp_path / "a workdir"
  for name in ("00000009", "00000010", "00000020", "30.tmp", "quarantine"):
    (workdir / "checkpoints" / name).mkdir(parents=True)
  metrics = '{"step": 11, "loss": 1.0}\n{"step": 12}\n{"st'
  (workdir / "metrics.jsonl").write_text(metrics)
  worker.do("run", str(workdir), "")
  status = worker.status()
  assert (status.step, status.checkpoint) == (12, 20)


def test_a_script_that_is_copied_over_does_not_disturb_a_run(worker, tmp_path):
  """Bash reads its script as it runs, and would read behind the old end."""
  worker.add("trainer", "sleep 1; exit 75")
  worker.do("run", str(tmp_path), "")
  script = worker.home / "grpo_tpu_worker.sh"
  text = script.read_text()
  more = f'[[ $verb != guard ]] || touch "{worker.home}/read on"\n'
  script.write_text(text + more)
  eventually(lambda: worker.status().exit_code == 75)
  time.sleep(0.3)
  assert not (worker.home / "read on").exists()


def test_an_image_runs_with_the_same_arguments(worker, tmp_path):
  calls = worker.home / "calls"
  worker.add("sudo", f'printf "%s|" "$@" >>"{calls}"')
  workdir = tmp_path / "a workdir"
  worker.do("run", str(workdir), "an/image:1", "--config=a b")
  eventually(lambda: worker.status().exit_code == 0)
  words = calls.read_text()
  assert words.endswith(
    f"|{workdir}:{workdir}|an/image:1|--config=a b|--workdir={workdir}|"
  )
