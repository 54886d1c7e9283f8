"""The small machine in the project that supervises a run."""

import getpass
import json
import logging
import pathlib
import shlex
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from typing import Any

from launch.pod import gcloud, lease, workers
from launch.pod import settings as pod_settings
from launch.pod.exits import Exit, Failure

_FLAGS = (
  *("--machine-type=e2-small", "--image-family=ubuntu-2404-lts-amd64"),
  *("--image-project=ubuntu-os-cloud", "--scopes=cloud-platform"),
)


def _call(cloud: gcloud.Gcloud, verb: str, *flags: str) -> str:
  name = f"{cloud.settings.name}-supervisor"
  words = (verb, name, f"--zone={cloud.settings.zones[0]}", *flags)
  return cloud.call("compute", "instances", *words).stdout


def _find(cloud: gcloud.Gcloud) -> dict[str, Any] | None:
  """The machine as the API describes it; None if there is none."""
  try:
    found = json.loads(_call(cloud, "describe", "--format=json") or "null")
  except Failure as failure:
    if failure.exit == Exit.ABSENT:
      return None
    raise
  name = cloud.settings.name
  if found and found.get("labels", {}).get(pod_settings.LABEL) != name:
    message = f"The machine {name}-supervisor lacks our label."
    raise Failure(Exit.NOT_OURS, message)
  return found


def delete(cloud: gcloud.Gcloud) -> None:
  """Deletes the machine, if there is one."""
  if _find(cloud):
    _call(cloud, "delete")
    logging.info("Deleted %s-supervisor.", cloud.settings.name)


def _pack(
  folder: pathlib.Path, env: pathlib.Path, command: Sequence[str]
) -> None:
  """Writes an archive of the last commit, the settings and the command."""
  workers.clone(folder / "code")
  shutil.copy(env, folder / "code" / "launch" / "tpu.env")
  # ssh of the machine and of this one then find the same home on workers.
  user = getpass.getuser()
  call = ["env", f"LOGNAME={user}", f"USER={user}"]
  call += ["bash", "code/launch/tpu.sh", *command]
  (folder / "command.sh").write_text(shlex.join(call) + "\n")
  with tarfile.open(folder / "files.tar.gz", "w:gz") as tar:
    for member in ("code", "command.sh"):
      tar.add(folder / member, member)


def create(
  cloud: gcloud.Gcloud, env: pathlib.Path, command: Sequence[str]
) -> None:
  """Creates the machine, which runs a command of `launch/tpu.sh`."""
  settings = cloud.settings
  found = _find(cloud)
  if found and found.get("status") not in ("TERMINATED", "STOPPED"):
    message = f"{settings.name}-supervisor exists already."
    raise Failure(Exit.BUSY, message)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    if not cloud.dry_run:
      lease.Lease(cloud).require_free()
      _pack(folder, env, command)
    delete(cloud)
    url = lease.url(settings, "files.tar.gz")
    (folder / "files").write_text(url)
    cloud.call("storage", "cp", str(folder / "files.tar.gz"), url)
    script = pathlib.Path(__file__).with_name("supervisor.sh")
    files = f"startup-script={script},files={folder / 'files'}"
    flags = [*_FLAGS, f"--metadata-from-file={files}"]
    flags += [f"--labels={settings.all_labels}"]
    flags += [f"--network={settings.network}"]
    if settings.subnetwork:
      flags.append(f"--subnet={settings.subnetwork}")
    if settings.ssh != "external":
      flags.append("--no-address")
    if settings.service_account:
      flags.append(f"--service-account={settings.service_account}")
    _call(cloud, "create", *flags)
  logging.info(
    "%s-supervisor supervises the run; `status`, `logs` and `stop` reach it.",
    settings.name,
  )
