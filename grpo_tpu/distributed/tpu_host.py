"""The TPU chips of this machine, and whether one process can use them.

    python -m grpo_tpu.distributed.tpu_host

tells `launch/smoke.sh` the number of devices, and why there are none although
there are chips. It needs only the standard library.
"""

import glob
import importlib.util
import os
import pathlib
import subprocess
import sys
import urllib.request

_ENDPOINTS = "computeMetadata/v1/instance/attributes/worker-network-endpoints"
_PROBE = "import jax; print(jax.device_count())"
_PROBE_SECONDS = 300
_LOCK = "/tmp/libtpu_lockfile"  # Held by a process that uses the chips.
_GOOGLE = "0x1ae0"  # Its PCI vendor id.


def find_chips() -> list[str]:
  """The device files of the chips.

  A laptop has VFIO groups too, of devices that it lends to virtual machines.
  """
  groups = glob.glob("/dev/vfio/[0-9]*")
  paths = map(pathlib.Path, glob.glob("/sys/bus/pci/devices/*/vendor"))
  vendors = [path.read_text().strip() for path in paths]
  is_other = bool(vendors) and _GOOGLE not in vendors
  return glob.glob("/dev/accel[0-9]*") + ([] if is_other else groups)


def hosts_in_environment() -> list[str]:
  """The hosts of the run, if GKE or a notebook service names them, else []."""
  given = os.environ.get
  names = given("TPU_PROCESS_ADDRESSES") or given("TPU_WORKER_HOSTNAMES")
  if not names and given("TPU_SKIP_MDS_QUERY"):
    names = "localhost"  # Nobody could name another.
  slices = int(given("MEGASCALE_NUM_SLICES") or 1)
  return names.split(",") * slices if names else []


def _hosts_in_metadata() -> list[str]:
  """The hosts that the metadata server of a TPU VM names; [] without one."""
  server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
  headers = {"Metadata-Flavor": "Google"}
  request = urllib.request.Request(
    f"http://{server}/{_ENDPOINTS}", None, headers
  )
  try:
    with urllib.request.urlopen(request, timeout=2) as answer:
      return answer.read().decode().split(",")
  except OSError:
    return []


def _holders(files: list[str]) -> list[str]:
  """The processes that have a file open; root alone sees those of others."""
  found = []
  for path in glob.glob("/proc/[0-9]*/fd/*"):
    try:
      found += [path.split("/")[2]] * (os.readlink(path) in files)
    except OSError:
      continue  # It has ended, or is another user's.
  return sorted(set(found), key=int)


def count_devices(chips: list[str]) -> tuple[int, str]:
  """The number of devices that one process can use, or 0 and why."""
  hosts = hosts_in_environment() or _hosts_in_metadata()
  if len(hosts) > 1:
    return 0, (
      f"this machine is one of the {len(hosts)} hosts of a slice, which a run"
      " must start together (`launch/tpu.sh run`)"
    )
  has_libtpu = importlib.util.find_spec("libtpu") is not None
  if not (has_libtpu or os.environ.get("TPU_LIBRARY_PATH")):
    pip = f"{sys.executable} -m pip install -c constraints.txt"
    return 0, f"libtpu is not installed: `{pip} libtpu`"
  if holders := _holders([*chips, _LOCK]):
    return 0, f"the chips are in use by process {', '.join(holders)}"
  command = [sys.executable, "-c", _PROBE]
  options = {"capture_output": True, "text": True, "timeout": _PROBE_SECONDS}
  platforms = os.environ | {"JAX_PLATFORMS": "tpu"}
  try:
    probe = subprocess.run(command, env=platforms, **options)
  except subprocess.TimeoutExpired:
    return 0, f"the chips have not answered in {_PROBE_SECONDS} s"
  if probe.returncode:
    lines = probe.stderr.strip().splitlines() or [f"exit {probe.returncode}"]
    return 0, lines[-1].partition(" (set JAX_PLATFORMS")[0]
  return int(probe.stdout.split()[-1]), ""


if __name__ == "__main__":
  found = find_chips()
  print(*(count_devices(found) if found else (0, "")))
