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
from tests.launch.pod import fake_cloud

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
  assert made.do("setup", "abc", made.send(a="1")).returncode == 0
  yield made
  made.do("stop", "1", "kill")


def test_setup_replaces_the_files_and_keeps_the_environment(worker):
  code = worker.home / "grpo_tpu" / "code"
  (code / ".venv").mkdir()
  (code / ".venv" / "made").touch()
  assert worker.do("setup", "def", worker.send(b="2")).returncode == 0
  assert not (code / "a").exists()
  assert (code / "b").exists() and (code / ".venv" / "made").exists()
  assert worker.status().commit == "def"


def test_an_archive_with_a_wrong_checksum_is_not_unpacked(worker):
  worker.send(b="2")
  done = worker.do("setup", "def", "0" * 64)
  assert done.returncode == 1 and "checksum" in done.stderr
  assert worker.status().commit == "abc"


def test_a_run_has_its_arguments_its_log_and_its_exit_code(worker, tmp_path):
  worker.add("trainer", "printf '%s\\n' \"$@\"; exit 76")
  words = ("--config=a b", "--x=$(touch owned); 'q'", '--y="*"')
  workdir = tmp_path / "the run's"
  assert worker.do("run", str(workdir), "", *words).returncode == 0
  fake_cloud.eventually(lambda: worker.status().state == "ended")
  assert worker.status().exit_code == 76
  log = worker.do("logs", "50").stdout.splitlines()
  expected = ["-m", "grpo_tpu.main", *words, f"--workdir={workdir}"]
  at = log.index("-m")
  assert log[at : at + len(expected)] == expected
  assert not list(worker.home.rglob("owned"))


def test_the_log_lies_in_a_shared_workdir_and_is_given_to_a_program(
  worker, tmp_path
):
  """The program copies it to a bucket."""
  worker.add("trainer", 'echo "a line in $GRPO_TPU_LOG"')
  shared = tmp_path / "shared"
  for workdir in (str(shared), "gs://my-bucket/a", str(shared)):
    worker.do("run", workdir, "")
    fake_cloud.eventually(lambda: worker.status().exit_code == 0)
    log = worker.do("logs", "9").stdout
    assert f"a line in {worker.state / 'log'}\n" in log
  (kept,) = (shared / "logs").iterdir()
  assert kept.name.startswith("worker-") and kept.read_text() == log
  assert log.count("a line") == 2  # Of both runs with this workdir.


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
  fake_cloud.eventually(lambda: worker.status().state == "ended")
  assert worker.status().details == [
    "step 100/100  reward 0.8  ETA 0:00",
    "a ([x] y) must be; set a=/x.",
    "Stopped (exit code 64): see above.",
    "Next: fix what the error names",
  ]
  worker.add("trainer", "exit 0")
  worker.do("run", str(tmp_path), "")
  fake_cloud.eventually(lambda: worker.status().exit_code == 0)
  assert worker.status().details == []


def test_the_status_of_a_run_has_its_progress(worker, tmp_path):
  (tmp_path / "log").write_text(LOG)
  worker.add("trainer", f"cat '{tmp_path}/log'; exec sleep 60")
  worker.do("run", str(tmp_path), "")
  fake_cloud.eventually(lambda: worker.status().details)
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
  fake_cloud.eventually(lambda: worker.status().exit_code == 143)


def test_a_run_without_its_guard_still_runs_and_then_is_lost(worker, tmp_path):
  worker.do("run", str(tmp_path), "")
  guard = pathlib.Path(f"/proc/{worker.pid()}/stat").read_text().split()[3]
  os.kill(int(guard), signal.SIGKILL)
  assert worker.status().state == "running"
  assert worker.do("run", str(tmp_path), "").returncode == exits.Exit.BUSY
  os.kill(worker.pid(), signal.SIGKILL)
  fake_cloud.eventually(lambda: worker.status().state == "lost")


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
  fake_cloud.eventually(lambda: worker.status().exit_code == 137)


def test_the_next_run_clears_the_mark_of_stop(worker, tmp_path):
  worker.do("run", str(tmp_path), "")
  assert worker.do("stop", "20").returncode == 0
  assert worker.status().was_stopped and worker.status().exit_code == 143
  worker.do("run", str(tmp_path), "")
  assert not worker.status().was_stopped and worker.status().exit_code is None


def test_a_bucket_is_given_to_the_program_as_it_is(worker):
  worker.add("trainer", "printf '%s\\n' \"$@\"")
  assert worker.do("run", "gs://my-bucket/a run", "").returncode == 0
  fake_cloud.eventually(lambda: worker.status().exit_code == 0)
  assert "--workdir=gs://my-bucket/a run" in worker.do("logs", "9").stdout


def test_progress_is_read_from_the_log_of_this_run(worker, tmp_path):
  lines = [
    *("step 11/20  reward 0.5", "Saved gs://b/w/checkpoints/00000010."),
    *("step 12/20  reward 0.5", "Removing /w/checkpoints/00000030, a save."),
  ]
  log = "".join(f"I1130 08:26:58.7 140 a.py:20] {line}\n" for line in lines)
  (tmp_path / "log").write_text(log)
  worker.add("trainer", f"cat '{tmp_path}/log'")
  worker.do("run", str(tmp_path), "")
  fake_cloud.eventually(lambda: worker.status().exit_code == 0)
  assert (worker.status().step, worker.status().checkpoint) == (12, 10)
  restored = "Restoring gs://b/w/checkpoints/00000010-2."
  (tmp_path / "log").write_text(f"I1130 08:26:58.7 140 a.py:20] {restored}\n")
  worker.do("run", str(tmp_path), "")
  fake_cloud.eventually(lambda: worker.status().exit_code == 0)
  assert (worker.status().step, worker.status().checkpoint) == (-1, 10)


VARIABLES = {
  "HF_TOKEN": "hf_$(touch owned) 'a' \\ \"b\"=c",
  "EMPTY": "",
  **{name: "mine" for name in ("state", "output", "command", "HOME", "pid")},
}


def test_a_run_has_its_environment_once_and_nothing_prints_it(worker, tmp_path):
  lines = [f"{name}={value}\n" for name, value in VARIABLES.items()]
  (worker.home / "grpo_tpu_env").write_text("".join(lines))
  worker.add("trainer", f"env -0 >'{tmp_path}/env'")

  def run() -> dict[str, str]:
    assert worker.do("run", str(tmp_path), "").returncode == 0
    fake_cloud.eventually(lambda: worker.status().exit_code == 0)
    words = (tmp_path / "env").read_text().split("\0")[:-1]
    return dict(word.split("=", 1) for word in words)

  found = run()
  assert VARIABLES.items() <= found.items()
  assert found["GRPO_TPU_LOG"] == str(worker.state / "log")
  assert found["TPU_LOG_DIR"] == "disabled"
  assert "hf_" not in worker.do("logs", "99").stdout
  assert not list(worker.home.rglob("owned"))
  assert "HF_TOKEN" not in run()


def test_a_refused_run_leaves_no_environment_to_the_next(worker, tmp_path):
  worker.do("run", str(tmp_path), "")
  (worker.home / "grpo_tpu_env").write_text("HF_TOKEN=hf_a\n")
  assert worker.do("run", str(tmp_path), "").returncode == exits.Exit.BUSY
  assert not (worker.home / "grpo_tpu_env").exists()


@pytest.mark.parametrize("is_held", [False, True])
def test_only_a_stale_lock_of_libtpu_is_removed(worker, tmp_path, is_held):
  lock = tmp_path / "libtpu_lockfile"
  holder = lock.open("w")
  if not is_held:
    holder.close()
  # The real lock may belong to someone.
  script = f'words=("$@"); words[-1]="{lock}"; "${{words[@]:1}}"'
  worker.add("sudo", script)
  assert worker.do("run", str(tmp_path), "").returncode == 0
  assert lock.exists() == is_held
  holder.close()


def test_python_is_installed_where_pip_is_missing_or_restricted(worker):
  calls = worker.home / "calls"
  worker.add(
    "python3",
    f'[[ $3 != --version ]] || exit 1; echo "$PIP_BREAK_\
SYSTEM_PACKAGES $*" >>"{calls}"; exit 1'.replace("\\\n", ""),
  )
  worker.add("sudo", f'echo "$*" >>"{calls}"')
  script = f'source <(sed "/^case /,$ d" "{SCRIPT}"); ensure_python'
  subprocess.run(
    ["bash", "-c", script],
    env={"HOME": str(worker.home), "PATH": f"{worker.bin}:/usr/bin:/bin"},
    capture_output=True,
  )
  update, install, pip = calls.read_text().splitlines()
  apt = "-n apt-get -o DPkg::Lock::Timeout=600 --yes --quiet"
  assert (update, install) == (f"{apt} update", f"{apt} install python3-pip")
  assert pip.startswith("1 -m pip install") and "--require-hashes" in pip


def test_a_script_that_is_copied_over_does_not_disturb_a_run(worker, tmp_path):
  """Bash reads its script as it runs, and would read behind the old end."""
  worker.add("trainer", "sleep 1; exit 75")
  worker.do("run", str(tmp_path), "")
  script = worker.home / "grpo_tpu_worker.sh"
  text = script.read_text()
  more = f'[[ $verb != guard ]] || touch "{worker.home}/read on"\n'
  script.write_text(text + more)
  fake_cloud.eventually(lambda: worker.status().exit_code == 75)
  time.sleep(0.3)
  assert not (worker.home / "read on").exists()


@pytest.mark.parametrize("bucket", [False, True])
def test_an_image_runs_with_the_same_arguments(worker, tmp_path, bucket):
  """A bucket needs no volume; a shared path has its own name inside."""
  calls = worker.home / "calls"
  worker.add("sudo", f'printf "%s|" "$@" >>"{calls}"')
  workdir = "gs://my-bucket/a" if bucket else str(tmp_path / "a workdir")
  worker.do("run", workdir, "an/image:1", "--config=a b")
  fake_cloud.eventually(lambda: worker.status().exit_code == 0)
  words = calls.read_text().split("|")
  assert words[-4:-1] == ["an/image:1", "--config=a b", f"--workdir={workdir}"]
  volumes = [words[at + 1] for at, x in enumerate(words) if x == "--volume"]
  assert volumes[2:] == ([] if bucket else [f"{workdir}:{workdir}"])
  home, state = (volume.rpartition(":")[0] for volume in volumes[:2])
  assert pathlib.Path(home).is_dir() and pathlib.Path(state) == worker.state
  assert {"--init", "memlock=-1", "--net=host", "--env-file"} <= set(words)
  assert "HOME=" + volumes[0].rpartition(":")[2] in words
