"""The pod on loopback, with shell scripts as hosts."""

import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from tests.terminal import Terminal

LOCAL_POD = (
  pathlib.Path(__file__).resolve().parents[2] / "launch" / "local_pod.sh"
)
# Host K records its arguments, then runs the command in ACT_K.
HOST = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then echo 4321; exit; fi
host=$JAX_PROCESS_ID
{
  echo "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PLATFORMS"
  echo "$XLA_FLAGS"
  printf '%s\\n' "$@"
} >"$RECORDS/$host.part" && mv "$RECORDS/$host.part" "$RECORDS/$host"
echo "host $host speaks"
act=ACT_$host
eval "${!act:-}"
"""


class Machine:
  """A folder with a blank in its name, and fake hosts."""

  def __init__(self, folder: pathlib.Path):
    self.records = folder / "their records"
    self.records.mkdir(parents=True)
    self.home = folder / "a home"
    self.home.mkdir()
    python = folder / "a python"
    python.write_text(HOST)
    python.chmod(0o755)
    self.environment = {
      "PATH": os.environ["PATH"],
      "RECORDS": str(self.records),
      "GRPO_TPU_PYTHON": str(python),
    }

  def start(self, *arguments: str, **acts: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
      # As in a terminal, even if the tests run in the background.
      ["env", "--default-signal=INT", "bash", str(LOCAL_POD), *arguments],
      cwd=self.home,
      env=self.environment | acts,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )

  def run(self, *arguments: str, **acts: str) -> tuple[int, str]:
    """Runs the script; returns its exit code and its output."""
    process = self.start(*arguments, **acts)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said

  def wait_for_traps(self) -> None:
    """Waits until both hosts run, and have set their traps."""
    while len([*self.records.glob("[01]")]) < 2:
      time.sleep(0.02)
    time.sleep(0.5)


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path / "some where")


WORKDIR = "--workdir=my runs/1"


def test_each_host_gets_its_address_and_its_number(machine):
  code, _ = machine.run("-n", "3", "-m", "2", "--", "--config=a b", WORKDIR)
  assert code == 0
  for host in range(3):
    address, flags, *words = (
      (machine.records / str(host)).read_text().splitlines()
    )
    assert address == "127.0.0.1:4321 3 cpu"
    assert flags.split() == ["--xla_force_host_platform_device_count=2"]
    assert words == [
      *("-m", "grpo_tpu.main", "--config=a b"),
      f"--workdir={machine.home}/my runs/1",
    ]


def test_each_host_has_a_log_and_the_first_is_shown(machine):
  _, said = machine.run("-n", "2", "--config=c", WORKDIR)
  for host in range(2):
    log = machine.home / "my runs" / "1" / "logs" / f"host-{host}.log"
    assert log.read_text() == f"host {host} speaks\n"
  assert "host 0 speaks" in said and "host 1 speaks" not in said


def test_a_second_start_appends_to_the_logs(machine):
  for _ in range(2):
    machine.run("-n", "2", "--workdir", "w")
  for host in range(2):
    log = machine.home / "w" / "logs" / f"host-{host}.log"
    assert log.read_text() == f"host {host} speaks\n" * 2


@pytest.mark.parametrize(
  ("act", "code"),
  [("exit 64", 64), ("exit 76", 76), ("kill -KILL $$", 137)],
)
def test_the_first_failure_is_the_exit_code(machine, act, code):
  """The others fail a little later, because of the first."""
  acts = {"ACT_0": "sleep 1; exit 1", "ACT_1": act}
  found, said = machine.run("-n", "2", WORKDIR, **acts)
  assert found == code
  assert f"Host 1 ended with exit code {code}" in said
  assert "logs/host-1.log" in said


def test_the_first_failure_ends_the_other_hosts(machine):
  """The other host never ends and ignores SIGTERM."""
  start = time.monotonic()
  stubborn = "trap : TERM; while :; do sleep 0.1; done"
  acts = {"ACT_0": stubborn, "ACT_1": "exit 76"}
  assert machine.run("-n", "2", WORKDIR, **acts)[0] == 76
  assert time.monotonic() - start < 30  # It grants the other host 10.


@pytest.mark.parametrize(
  ("codes", "code"),
  [((75, 75), 75), ((75, 1), 1), ((1, 75), 1), ((0, 1), 1), ((0, 0), 0)],
)
def test_a_pod_is_preempted_if_no_host_fails(machine, codes, code):
  acts = {f"ACT_{host}": f"exit {x}" for host, x in enumerate(codes)}
  assert machine.run("-n", "2", WORKDIR, **acts)[0] == code


def test_a_preempted_host_leaves_the_others_time_to_save(machine):
  """More time than after a failure."""
  acts = {"ACT_0": "exit 75", "ACT_1": "sleep 11; exit 75"}
  assert machine.run("-n", "2", WORKDIR, **acts)[0] == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_preempts_every_host(machine, number):
  saves = "trap 'exit 75' TERM; while :; do sleep 0.1; done"
  process = machine.start("-n", "2", WORKDIR, ACT_0=saves, ACT_1=saves)
  machine.wait_for_traps()
  process.send_signal(number)
  process.communicate(timeout=60)
  assert process.returncode == 75


def test_ctrl_c_on_a_terminal_preempts_every_host(machine):
  """The terminal sends it to all that the script has started, too."""
  saves = "trap 'echo saved; exit 75' TERM; while :; do sleep 0.1 || :; done"
  variables = {"ACT_0": saves, "ACT_1": saves}
  terminal = Terminal(
    *("bash", str(LOCAL_POD), "-n", "2", WORKDIR),
    environment=machine.environment | variables,
    folder=machine.home,
  )
  try:
    machine.wait_for_traps()
    terminal.press()
    assert terminal.end() == 75, terminal.text
  finally:
    terminal.close()
  logs = machine.home / "my runs" / "1" / "logs"
  assert [x.read_text().count("saved") for x in logs.iterdir()] == [1, 1]


def test_a_second_signal_kills_the_hosts(machine):
  stubborn = "trap : TERM; while :; do sleep 0.1; done"
  process = machine.start("-n", "2", WORKDIR, ACT_0=stubborn, ACT_1=stubborn)
  machine.wait_for_traps()
  process.send_signal(signal.SIGTERM)
  time.sleep(1)
  assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 137


@pytest.mark.skipif(not shutil.which("setpriv"), reason="no setpriv here")
def test_hosts_do_not_outlive_a_killed_script(machine):
  act = 'echo $$ >"$RECORDS/pid.$host"; while :; do sleep 0.1; done'
  process = machine.start("-n", "1", WORKDIR, ACT_0=act)
  pid = machine.records / "pid.0"
  while not (pid.exists() and pid.read_text()):
    time.sleep(0.02)
  process.kill()
  process.wait()
  deadline = time.monotonic() + 20
  while _is_alive(int(pid.read_text())):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  process.communicate(timeout=20)


def _is_alive(pid: int) -> bool:
  try:
    status = pathlib.Path(f"/proc/{pid}/stat").read_text()
  except OSError:
    return False
  return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
  ("arguments", "word"),
  [
    (("-n", "0", WORKDIR), "-n must be"),
    (("-n", "x", WORKDIR), "-n must be"),
    (("-n",), "-n must be"),
    (("-m", "1.5", WORKDIR), "-m must be"),
    (("-n", "2", "--config=c"), "--workdir=DIR must"),
    (("two", WORKDIR), "'two'"),
  ],
)
def test_a_wrong_command_line_starts_no_host(machine, arguments, word):
  code, said = machine.run(*arguments)
  assert code == 64
  assert word in said and "usage:" in said
  assert list(machine.records.iterdir()) == []
