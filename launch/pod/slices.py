"""TPU slices: create, wait, find, delete."""

import dataclasses
import enum
import logging
import time
from typing import Any

from data_pipelines.validation import printable
from launch.pod import gcloud, shapes
from launch.pod import settings as pod_settings
from launch.pod.exits import Exit, Failure


class State(enum.Enum):
  """The state of a slice."""

  ABSENT = "absent"
  PENDING = "pending"
  READY = "ready"
  FAILED = "failed"
  SUSPENDED = "suspended"
  PREEMPTED = "preempted"
  DELETING = "deleting"


# States of queued resources and of TPU VMs in the API. All others are PENDING.
_STATES = {
  "FAILED": State.FAILED,
  "READY": State.READY,
  "PREEMPTED": State.PREEMPTED,
  "TERMINATED": State.PREEMPTED,
  "STOPPING": State.SUSPENDED,
  "STOPPED": State.SUSPENDED,
  "HIDING": State.SUSPENDED,
  "HIDDEN": State.SUSPENDED,
  "SUSPENDING": State.SUSPENDED,
  "SUSPENDED": State.SUSPENDED,
  "DELETING": State.DELETING,
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice as the API describes it."""

  state: State
  details: str  # The states in the API's words, and the reason of a failure.
  is_ours: bool  # True if the slice has our label with its own name.
  accelerator_type: str  # Empty if the API does not say.
  num_workers: int  # The number of machines; 0 until it has any.
  is_queued: bool  # True if the slice belongs to a queued resource.

  def failure(self, name: str) -> Failure:
    """The failure of a verb that needs a ready slice."""
    return Failure(
      Exit.__members__.get(self.state.name, Exit.TIMEOUT),
      f"The slice {name} is {self.state.value}: {self.details}.",
    )


def from_api(
  request: dict[str, Any] | None, node: dict[str, Any] | None, name: str
) -> Slice:
  """Makes a slice from the API's queued resource and TPU VM, if they exist."""
  spec: dict[str, Any] = {}
  details = []
  state = State.ABSENT
  if request is not None:
    answer = request.get("state", {})
    state = _STATES.get(answer.get("state", ""), State.PENDING)
    details.append(f"the queued resource is {answer.get('state', 'new')}")
    if reason := answer.get("failedData", {}).get("error", {}).get("message"):
      details.append(reason)
    if nodes := request.get("tpu", {}).get("nodeSpec"):
      spec = nodes[0].get("node", {})
  if node is not None:
    spec = node
    details.append(f"the TPU VM is {node.get('state', 'new')}")
    # A failed or suspended request explains more than its machines do.
    if state in (State.ABSENT, State.PENDING):
      state = _STATES.get(node.get("state", ""), State.PENDING)
  return Slice(
    state=state,
    details=printable("; ".join(details)) or "no slice has this name",
    is_ours=spec.get("labels", {}).get(pod_settings.LABEL) == name,
    accelerator_type=spec.get("acceleratorType", ""),
    num_workers=len((node or {}).get("networkEndpoints", [])),
    is_queued=request is not None,
  )


def find(
  cloud: gcloud.Gcloud, *, assumed: State, always_ask_queue: bool = False
) -> Slice:
  """Asks the API for the slice; a dry run assumes its state.

  Without `always_ask_queue`, a ready TPU VM makes the second question needless.
  """
  settings = cloud.settings
  node = cloud.describe("tpu-vm")
  state = assumed.name if cloud.dry_run else (node or {}).get("state")
  request = None
  if always_ask_queue or state != "READY":
    request = cloud.describe("queued-resources")
  if not cloud.dry_run:
    return from_api(request, node, settings.name)
  shape = shapes.SHAPES.get(settings.accelerator_type)
  return Slice(
    state=assumed,
    details="a dry run",
    is_ours=True,
    accelerator_type=settings.accelerator_type,
    num_workers=shape.hosts if shape else 1,
    is_queued=settings.request == "queued",
  )


def require_ready(cloud: gcloud.Gcloud) -> Slice:
  """Finds the slice and checks that it is ready."""
  found = find(cloud, assumed=State.READY)
  if found.state != State.READY:
    raise found.failure(cloud.settings.name)
  return found


def _require_ours(settings: pod_settings.Settings, found: Slice) -> None:
  if not found.is_ours:
    label = f"{pod_settings.LABEL}={settings.name}"
    raise Failure(
      Exit.NOT_OURS,
      f"{settings.name} in {settings.zone} lacks the label {label}, so these"
      " scripts did not create it.",
    )


def create(cloud: gcloud.Gcloud) -> None:
  """Requests the slice, unless it exists or is on its way."""
  settings = cloud.settings
  found = find(cloud, assumed=State.ABSENT)
  if found.state == State.ABSENT:
    cloud.tpus(*_create_words(settings))
    details = (settings.name, settings.accelerator_type, settings.capacity)
    logging.info("Requested %s: %s, %s.", *details)
    return
  _require_ours(settings, found)
  if found.accelerator_type != settings.accelerator_type:
    raise Failure(
      Exit.BAD_REQUEST,
      f"ACCELERATOR_TYPE ({settings.accelerator_type!r}) must be the type of"
      f" the existing slice {settings.name} ({found.accelerator_type!r});"
      " change it, choose another NAME, or `delete` the slice.",
    )
  if found.state not in (State.READY, State.PENDING):
    raise found.failure(settings.name)
  logging.info("%s already exists: %s.", settings.name, found.details)


def _create_words(settings: pod_settings.Settings) -> list[str]:
  name = settings.name
  if settings.request == "queued":
    words = ["queued-resources", "create", name, f"--node-id={name}"]
    words.append(f"--runtime-version={settings.runtime_version}")
    words.append(f"--valid-until-duration={settings.valid_for}")
  else:
    words = ["tpu-vm", "create", name, f"--version={settings.runtime_version}"]
  words.append(f"--accelerator-type={settings.accelerator_type}")
  if settings.capacity != "on-demand":
    words.append(f"--{settings.capacity}")
  words += [f"--network={settings.network}", f"--labels={settings.all_labels}"]
  if settings.subnetwork:
    words.append(f"--subnetwork={settings.subnetwork}")
  if settings.ssh != "external":
    words.append("--internal-ips")
  if settings.service_account:
    words.append(f"--service-account={settings.service_account}")
  return words


def wait(
  cloud: gcloud.Gcloud, *, timeout_seconds: float, poll_seconds: float
) -> Slice:
  """Waits until the slice is ready."""
  deadline = time.monotonic() + timeout_seconds
  while True:
    found = find(cloud, assumed=State.READY)
    if found.state == State.READY:
      return found
    remaining = deadline - time.monotonic()
    if found.state != State.PENDING or remaining <= 0:
      raise found.failure(cloud.settings.name)
    time.sleep(min(poll_seconds, remaining))


def delete(cloud: gcloud.Gcloud) -> None:
  """Deletes the slice, or takes it out of the queue."""
  settings = cloud.settings
  found = find(cloud, assumed=State.READY, always_ask_queue=True)
  if found.state == State.ABSENT:
    logging.info("%s does not exist: nothing to delete.", settings.name)
    return
  _require_ours(settings, found)
  if found.is_queued:
    cloud.tpus("queued-resources", "delete", settings.name, "--force")
  else:
    cloud.tpus("tpu-vm", "delete", settings.name)
  logging.info("Deleted %s.", settings.name)
