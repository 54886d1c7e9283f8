"""A slice: asking for it, waiting for it, giving it back."""

import dataclasses
import enum
import time
from typing import Any

from launch.pod import exits, gcloud, settings, shapes

Exit = exits.Exit


class Condition(enum.Enum):
  """What can be done with a slice."""

  ABSENT = "absent"
  COMING = "coming"
  READY = "ready"
  FAILED = "failed"
  SUSPENDED = "suspended"
  PREEMPTED = "preempted"
  GOING = "going"


_OF_NODE = {
  "READY": Condition.READY,
  "PREEMPTED": Condition.PREEMPTED,
  "TERMINATED": Condition.PREEMPTED,
  "STOPPING": Condition.SUSPENDED,
  "STOPPED": Condition.SUSPENDED,
  "HIDING": Condition.SUSPENDED,
  "HIDDEN": Condition.SUSPENDED,
  "DELETING": Condition.GOING,
}
_OF_REQUEST = {
  "FAILED": Condition.FAILED,
  "SUSPENDING": Condition.SUSPENDED,
  "SUSPENDED": Condition.SUSPENDED,
  "DELETING": Condition.GOING,
}
_EXITS = {
  Condition.ABSENT: Exit.ABSENT,
  Condition.FAILED: Exit.FAILED,
  Condition.SUSPENDED: Exit.SUSPENDED,
  Condition.PREEMPTED: Exit.PREEMPTED,
  Condition.COMING: Exit.TIMEOUT,
  Condition.GOING: Exit.TIMEOUT,
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """What the API says of a slice.

  Attributes:
    condition: What can be done with it.
    words: Its states as the API names them, and the reason of a failure.
    is_ours: Whether it carries the label of what is made here, with its name.
    accelerator_type: What it is; empty if the API does not say.
    num_workers: Machines; 0 until it has any.
    is_queued: Whether a queued resource stands behind it.
  """

  condition: Condition
  words: str
  is_ours: bool
  accelerator_type: str
  num_workers: int
  is_queued: bool

  def failure(self, name: str) -> exits.Failure:
    """Of whoever needs the slice, when it is not ready."""
    return exits.Failure(
      _EXITS[self.condition],
      f"The slice {name} is {self.condition.value}: {self.words}.",
    )


def seen(
  request: dict[str, Any] | None, node: dict[str, Any] | None, name: str
) -> Slice:
  """A slice from the API's answers.

  Args:
    request: The queued resource; None if there is none, or none was asked for.
    node: The TPU VM; None if there is none.
    name: Of both.
  """
  specification: dict[str, Any] = {}
  words = []
  condition = Condition.ABSENT
  if request is not None:
    state = request.get("state", {})
    condition = _OF_REQUEST.get(state.get("state", ""), Condition.COMING)
    words.append(f"the queued resource is {state.get('state', 'new')}")
    reason = state.get("failedData", {}).get("error", {}).get("message")
    words.extend([reason] if reason else [])
    nodes = request.get("tpu", {}).get("nodeSpec", [])
    specification = nodes[0].get("node", {}) if nodes else {}
  if node is not None:
    specification = node
    of_node = _OF_NODE.get(node.get("state", ""), Condition.COMING)
    words.append(f"the TPU VM is {node.get('state', 'new')}")
    # A request that has failed or been suspended says more than its machines.
    if condition in (Condition.ABSENT, Condition.COMING):
      condition = of_node
  return Slice(
    condition=condition,
    words="; ".join(words) or "there is none of this name",
    is_ours=specification.get("labels", {}).get(settings.OUR_LABEL) == name,
    accelerator_type=specification.get("acceleratorType", ""),
    num_workers=len((node or {}).get("networkEndpoints", [])),
    is_queued=request is not None,
  )


def look(cloud: gcloud.Gcloud, *, assumed: Condition) -> Slice:
  """The slice of the settings, as it is now.

  Args:
    cloud: Where to ask.
    assumed: How a dry run finds it.
  """
  of = cloud.settings
  node = cloud.describe("tpu-vm")
  if cloud.dry_run:
    known = shapes.SHAPES.get(of.accelerator_type)
    num_workers = known.hosts if known else 1
    is_queued = of.request == "queued"
    return Slice(
      assumed, "a dry run", True, of.accelerator_type, num_workers, is_queued
    )
  if node is not None and node.get("state") == "READY":
    return seen(None, node, of.name)
  return seen(cloud.describe("queued-resources"), node, of.name)


def require_ready(cloud: gcloud.Gcloud) -> Slice:
  """The slice, with machines to work on.

  Raises:
    Failure: It is not ready.
  """
  found = look(cloud, assumed=Condition.READY)
  if found.condition != Condition.READY:
    raise found.failure(cloud.settings.name)
  return found


def require_ours(cloud: gcloud.Gcloud, found: Slice) -> None:
  """Passes a slice that was made here.

  Raises:
    Failure: It does not carry the label.
  """
  if not found.is_ours:
    name = cloud.settings.name
    raise exits.Failure(
      Exit.NOT_OURS,
      f"{name} in {cloud.settings.zone} lacks the label"
      f" {settings.OUR_LABEL}={name}: it was not made by these scripts.",
    )


def create(cloud: gcloud.Gcloud) -> str:
  """Asks for the slice, unless it is there or on its way.

  Returns:
    What was done, for the user.

  Raises:
    Failure: It could not be asked for; or one of this name is there that is
      not ours, is another type, or is of no more use.
  """
  of = cloud.settings
  found = look(cloud, assumed=Condition.ABSENT)
  if found.condition == Condition.ABSENT:
    cloud.change(_create_words(of))
    return f"Asked for {of.name}, {of.accelerator_type}, {of.capacity}."
  require_ours(cloud, found)
  if found.accelerator_type != of.accelerator_type:
    raise exits.Failure(
      Exit.BAD_REQUEST,
      f"ACCELERATOR_TYPE ({of.accelerator_type!r}) must be that of the slice"
      f" {of.name} that is there ({found.accelerator_type!r}); change it,"
      " choose another NAME, or `delete` the slice.",
    )
  if found.condition not in (Condition.READY, Condition.COMING):
    raise found.failure(of.name)
  return f"{of.name} is there already: {found.words}."


def _create_words(of: settings.Settings) -> list[str]:
  words = {
    "queued": [
      *("queued-resources", "create", of.name, f"--node-id={of.name}"),
      f"--runtime-version={of.runtime_version}",
      f"--valid-until-duration={of.valid_for}",
    ],
    "direct": ["tpu-vm", "create", of.name, f"--version={of.runtime_version}"],
  }[of.request]
  words.append(f"--accelerator-type={of.accelerator_type}")
  words += {"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}[
    of.capacity
  ]
  words += [f"--network={of.network}", f"--labels={of.all_labels}"]
  if of.subnetwork:
    words.append(f"--subnetwork={of.subnetwork}")
  if of.ssh != "external":
    words.append("--internal-ips")
  if of.service_account:
    words.append(f"--service-account={of.service_account}")
  return words


def wait(
  cloud: gcloud.Gcloud, *, timeout_seconds: float, poll_seconds: float
) -> Slice:
  """The slice, once it is ready.

  Raises:
    Failure: It will not be, or was not in time.
  """
  until = time.monotonic() + timeout_seconds
  while True:
    found = look(cloud, assumed=Condition.READY)
    if found.condition == Condition.READY:
      return found
    left = until - time.monotonic()
    if found.condition != Condition.COMING or left <= 0:
      raise found.failure(cloud.settings.name)
    time.sleep(min(poll_seconds, left))


def delete(cloud: gcloud.Gcloud) -> str:
  """Gives the slice back, and its place in the queue.

  Returns:
    What was done, for the user.

  Raises:
    Failure: It is not ours, or could not be deleted.
  """
  of = cloud.settings
  request = cloud.describe("queued-resources")
  node = cloud.describe("tpu-vm")
  if cloud.dry_run:
    found = Slice(Condition.READY, "", True, "", 0, of.request == "queued")
  else:
    found = seen(request, node, of.name)
  if found.condition == Condition.ABSENT:
    return f"There is no {of.name} in {of.zone}: nothing to delete."
  require_ours(cloud, found)
  if found.is_queued:
    cloud.change(["queued-resources", "delete", of.name, "--force"])
  else:
    cloud.change(["tpu-vm", "delete", of.name])
  return f"Deleted {of.name}."
