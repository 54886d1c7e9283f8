"""A machine in the project supervises a run; the laptop reaches it."""

import json
import os
import pathlib
import re
import shlex
import subprocess

import pytest

from launch.pod import exits
from tests.launch.pod import fake_cloud

pytestmark = [
  fake_cloud.needs_gcloud,
  pytest.mark.nightly,  # Each call of gcloud takes a second.
]

CONFIG = "configs/my config.py"
RECORD = ("my-bucket", "runs/first.supervisor/state.json")
STUB = """#!/bin/bash
echo "$@" >>"{root}/called"
{then}
"""


class Machine:
  """The supervisor's machine: its startup script in a folder, no systemd."""

  def __init__(self, folder: pathlib.Path, cloud, laptop):
    self.cloud, self.root = cloud, folder / "machine"
    (self.root / "bin").mkdir(parents=True)
    items = cloud.machines["grpo-1-supervisor"]["metadata"]["items"]
    metadata = {item["key"]: item["value"] for item in items}
    self.script = self.root / "script"
    self.script.write_text(metadata["startup-script"])
    for name, then in (
      ("curl", f"printf %s {shlex.quote(metadata['files'])}"),
      ("systemctl", "exit 0"),
      ("systemd-run", "exit 0"),
    ):
      path = self.root / "bin" / name
      path.write_text(STUB.format(root=self.root, then=then))
      path.chmod(0o755)
    self.environment = laptop.environment | {
      "GRPO_TPU_ROOT": str(self.root),
      "HOME": str(folder / "home"),
      "PATH": f"{self.root / 'bin'}{os.pathsep}{laptop.environment['PATH']}",
    }

  def boot(self) -> None:
    subprocess.run(
      ["bash", str(self.script)], env=self.environment, check=True, timeout=60
    )
    path = self.root / "var/lib/grpo_tpu/code/launch/pod/lease.py"
    text = path.read_text().replace("_SECONDS = 60.0", "_SECONDS = 2.0")
    path.write_text(text.replace("_SECONDS = 240.0", "_SECONDS = 16.0"))

  def start(self) -> subprocess.Popen[str]:
    """Starts what the unit starts."""
    unit, _, command = self.called[-1].partition(" bash ")
    assert "--property=Restart=always" in unit.split()
    return subprocess.Popen(
      ["bash", *command.split()],
      env=self.environment,
      start_new_session=True,
      text=True,
    )

  @property
  def record(self) -> dict:
    found = self.cloud.store.objects.get(RECORD)
    return json.loads(bytes(found.data)) if found else {}

  @property
  def called(self) -> list[str]:
    path = self.root / "called"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(laptop, cloud, tmp_path):
  cloud.num_workers = 1
  flags = ("--poll=0.5", "--pause=0.1", CONFIG, "--", "--config.a=it's $HOME")
  done = laptop.tpu("supervise", "--on-vm", *flags)
  assert done.returncode == 0, done.stderr
  assert "in europe-west4-b: about $7.12 (estimate;" in done.stderr
  return Machine(tmp_path, cloud, laptop)


def test_a_machine_supervises_and_the_laptop_reaches_it(machine, laptop, cloud):
  again = laptop.tpu("supervise", "--on-vm", CONFIG)
  assert again.returncode == exits.Exit.BUSY
  machine.boot()
  process = machine.start()
  fake_cloud.eventually(lambda: (cloud.folder / "started").exists())
  started = json.loads((cloud.folder / "started").read_text().splitlines()[0])
  assert "--config.a=it's $HOME" in started["words"]
  status = laptop.tpu("status").stdout
  assert "at work" in status and "worker 0: running" in status
  assert re.search(r"So far: \d+\.\d hours of slices, about \$", status)
  assert "[supervisor]" in laptop.tpu("logs").stdout

  # A second supervisor sees the lease change, and leaves.
  path = laptop.checkout / "launch" / "pod" / "lease.py"
  text = path.read_text()
  path.write_text(text.replace("_SECONDS = 240.0", "_SECONDS = 24.0"))
  second = laptop.tpu("supervise", CONFIG)
  assert second.returncode == exits.Exit.BUSY, second.stderr
  assert "supervises this run" in second.stderr

  # A killed supervisor is started again, and finds the run.
  os.killpg(process.pid, 9)
  process.wait()
  owner = machine.record["owner"]
  process = machine.start()
  fake_cloud.eventually(lambda: machine.record["owner"] != owner)
  assert len((cloud.folder / "started").read_text().splitlines()) == 1

  stopped = laptop.tpu("stop")
  assert stopped.returncode == 0, stopped.stderr
  assert process.wait(timeout=200) == 0
  assert machine.record["exit_code"] == 75
  assert machine.called[-1] == "poweroff"
  assert cloud.nodes == cloud.queued == {}
  ended = laptop.tpu("status")
  assert ended.returncode == exits.Exit.ABSENT
  assert "ended with exit code 75" in ended.stdout
  deleted = laptop.tpu("delete")
  assert deleted.returncode == 0 and cloud.machines == {}
  assert laptop.token not in stopped.stderr + status + deleted.stderr


def test_a_run_is_stopped_before_it_has_a_slice(machine, laptop, cloud):
  cloud.requested_states = ["WAITING_FOR_RESOURCES"]
  machine.boot()
  process = machine.start()
  fake_cloud.eventually(lambda: cloud.queued)
  assert laptop.tpu("stop").returncode == 0
  assert process.wait(timeout=200) == 0
  assert machine.record["exit_code"] == 75
  assert cloud.queued == {} and machine.called[-1] == "poweroff"
