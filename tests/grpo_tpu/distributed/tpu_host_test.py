"""Chips are found, and what keeps one process from using them is named."""

import os
import socket
import sys

import pytest

from grpo_tpu.distributed import tpu_host

GOOGLE, OTHER = "0x1ae0\n", "0x10de\n"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
  """A TPU VM of one host with libtpu, but for what a test changes."""
  for name in list(os.environ):
    if name.startswith(("TPU_", "MEGASCALE_", "GCE_METADATA")):
      monkeypatch.delenv(name)
  monkeypatch.setattr(tpu_host, "_hosts_in_metadata", lambda: ["t1v-0"])
  monkeypatch.setattr(tpu_host, "_LOCK", str(tmp_path / "lock"))
  monkeypatch.setattr(tpu_host.importlib.util, "find_spec", lambda _: "libtpu")
  return monkeypatch


def answer(machine, tmp_path, code: str) -> tuple[int, str]:
  """What is said where the chips answer a probe as this code does."""
  python = tmp_path / "python"
  python.write_text(f"#!/bin/sh\n{code}\n")
  python.chmod(0o755)
  machine.setattr(tpu_host.sys, "executable", str(python))
  return tpu_host.count_devices(["/dev/accel0"])


@pytest.mark.parametrize(
  ("files", "vendors", "found"),
  [
    ([], [OTHER], []),
    (["/dev/accel0"], [OTHER], ["/dev/accel0"]),
    (
      ["/dev/vfio/0", "/dev/vfio/1"],
      [OTHER, GOOGLE],
      ["/dev/vfio/0", "/dev/vfio/1"],
    ),
    (["/dev/vfio/12"], [OTHER], []),
    (["/dev/vfio/0"], [], ["/dev/vfio/0"]),
  ],
  ids=["none", "accel", "vfio", "a laptop's vfio", "a container without PCI"],
)
def test_chips_are_told_from_other_devices(
  machine, tmp_path, files, vendors, found
):
  paths = []
  for text in vendors:
    paths.append(tmp_path / str(len(paths)))
    paths[-1].write_text(text)
  by_folder = {"sys": [str(path) for path in paths]}
  by_folder["accel[0-9]*"] = [x for x in files if "accel" in x]
  by_folder["vfio"] = [x for x in files if "vfio" in x]
  machine.setattr(
    tpu_host.glob,
    "glob",
    lambda pattern: by_folder[
      "sys" if pattern.startswith("/sys") else pattern.split("/")[2]
    ],
  )
  assert tpu_host.find_chips() == found


@pytest.mark.parametrize(
  ("variables", "hosts"),
  [
    ({}, 0),
    ({"TPU_PROCESS_ADDRESSES": "local"}, 1),
    ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, 4),
    ({"TPU_SKIP_MDS_QUERY": "1"}, 1),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, 2),
  ],
)
def test_the_environment_names_the_hosts(machine, variables, hosts):
  for name, value in variables.items():
    machine.setenv(name, value)
  assert len(tpu_host.hosts_in_environment()) == hosts


def test_chips_that_answer_are_counted(machine, tmp_path):
  code = '[ "$JAX_PLATFORMS" = tpu ] && echo noise && echo 8'
  assert answer(machine, tmp_path, code) == (8, "")


def test_one_host_of_a_slice_is_not_used_alone(machine, tmp_path):
  machine.setattr(tpu_host, "_hosts_in_metadata", lambda: ["a", "b"])
  count, reason = answer(machine, tmp_path, "echo 16")
  assert count == 0 and "one of the 2 hosts" in reason


def test_a_missing_libtpu_is_named_with_the_command(machine, tmp_path):
  machine.setattr(tpu_host.importlib.util, "find_spec", lambda _: None)
  count, reason = answer(machine, tmp_path, "echo 8")
  assert count == 0 and "libtpu is not installed" in reason
  assert f"{sys.executable} -m pip install" in reason


def test_the_process_that_uses_the_chips_is_named(machine, tmp_path):
  with open(tpu_host._LOCK, "w", encoding="utf-8"):
    count, reason = answer(machine, tmp_path, "echo 8")
  assert count == 0 and reason.endswith(f"in use by process {os.getpid()}")
  assert answer(machine, tmp_path, "echo 8") == (8, "")


@pytest.mark.parametrize(
  ("code", "said"),
  [
    (
      "echo first >&2; echo 'X: lock (set JAX_PLATFORMS=..)' >&2; exit 1",
      "X: lock",
    ),
    ("exit 3", "exit 3"),
    ("sleep 9", "have not answered in 0.2 s"),
  ],
  ids=["an error", "no word", "no answer"],
)
def test_what_libtpu_says_is_the_reason(machine, tmp_path, code, said):
  machine.setattr(tpu_host, "_PROBE_SECONDS", 0.2)
  count, reason = answer(machine, tmp_path, code)
  assert count == 0 and reason.endswith(said)


def test_a_silent_metadata_server_names_nobody(machine):
  machine.undo()
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    server = f"127.0.0.1:{taken.getsockname()[1]}"
    machine.setenv("GCE_METADATA_IP", server)
    assert tpu_host._hosts_in_metadata() == []
