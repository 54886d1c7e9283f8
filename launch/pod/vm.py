"""The small machine in the project that supervises a run."""

import getpass
import logging
import pathlib
import shlex
import shutil
import tempfile
from collections.abc import Sequence

from launch.pod import gcloud, lease, workers
from launch.pod import settings as pod_settings
from launch.pod.exits import Exit, Failure, ignore

_FLAGS = (
  *("--machine-type=e2-small", "--image-family=ubuntu-2404-lts-amd64"),
  *("--image-project=ubuntu-os-cloud", "--scopes=cloud-platform"),
)


def _call(cloud: gcloud.Gcloud, verb: str, *flags: str) -> str:
  name = f"{cloud.settings.name}-supervisor"
  words = (verb, name, f"--zone={cloud.settings.zones[0]}", *flags)
  return cloud.call("compute", "instances", *words).stdout


def _status(cloud: gcloud.Gcloud) -> str:
  """The state of the machine in the API's words; empty if there is none."""
  name, found = cloud.settings.name, []
  with ignore(Exit.ABSENT):
    keys = f"--format=value(status,labels.{pod_settings.LABEL})"
    found = _call(cloud, "describe", keys).split()
  if found and found[1:] != [name]:
    message = f"The machine {name}-supervisor lacks our label."
    raise Failure(Exit.NOT_OURS, message)
  return found[0] if found else ""


def delete(cloud: gcloud.Gcloud) -> None:
  """Deletes the machine, if there is one."""
  if _status(cloud):
    _call(cloud, "delete")
    logging.info("Deleted %s-supervisor.", cloud.settings.name)


def _pack(
  folder: pathlib.Path, env: pathlib.Path, command: Sequence[str]
) -> str:
  """Packs the last commit, the settings and the command; returns the file."""
  workers.clone(folder / "code")
  shutil.copy(env, folder / "code" / "launch" / "tpu.env")
  # ssh of the machine and of this one then find the same home on workers.
  user = getpass.getuser()
  call = ["env", f"LOGNAME={user}", f"USER={user}"]
  call += ["bash", "code/launch/tpu.sh", *command]
  (folder / "command.sh").write_text(shlex.join(call) + "\n")
  return shutil.make_archive(f"{folder}.files", "gztar", folder)


def create(
  cloud: gcloud.Gcloud, env: pathlib.Path, command: Sequence[str]
) -> None:
  """Creates the machine, which runs a command of `launch/tpu.sh`."""
  settings = cloud.settings
  if _status(cloud) not in ("", "TERMINATED", "STOPPED"):
    message = f"{settings.name}-supervisor exists already."
    raise Failure(Exit.BUSY, message)
  url = lease.url(settings, "files.tar.gz")
  script = pathlib.Path(__file__).with_name("supervisor.sh")
  with tempfile.TemporaryDirectory() as name:
    folder, files = pathlib.Path(name), "files.tar.gz"
    if not cloud.dry_run:
      lease.Lease(cloud).require_free()
      files = _pack(folder / "packed", env, command)
    delete(cloud)
    cloud.call("storage", "cp", files, url)
    (folder / "url").write_text(url)
    flags = {
      "metadata-from-file": f"startup-script={script},files={folder / 'url'}",
      "labels": settings.all_labels,
      "network": settings.network,
      "subnet": settings.subnetwork,
      "service-account": settings.service_account,
    }
    words = [f"--{key}={value}" for key, value in flags.items() if value]
    words += ["--no-address"] * (settings.ssh != "external")
    _call(cloud, "create", *_FLAGS, *words)
  logging.info(
    "%s-supervisor supervises the run; `status`, `logs` and `stop` reach it.",
    settings.name,
  )
