"""TPU slices: create, wait, find, delete."""

import dataclasses
import enum
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from data_pipelines import validation
from launch.pod import gcloud, shapes
from launch.pod import settings as pod_settings
from launch.pod.exits import Exit, Failure


class State(enum.Enum):
  """The state of a slice; of several slices, the last in this order counts."""

  ABSENT = "absent"
  READY = "ready"
  PENDING = "pending"
  FAILED = "failed"
  SUSPENDED = "suspended"
  PREEMPTED = "preempted"
  DELETING = "deleting"


# States of queued resources and of TPU VMs in the API. All others are PENDING.
_STATES = {
  **{name: State[name] for name in ("FAILED", "READY", "DELETING")},
  **dict.fromkeys(("PREEMPTED", "TERMINATED"), State.PREEMPTED),
  **dict.fromkeys(("STOPPING", "STOPPED", "HIDING"), State.SUSPENDED),
  **dict.fromkeys(("HIDDEN", "SUSPENDING", "SUSPENDED"), State.SUSPENDED),
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice as the API describes it."""

  state: State
  details: str  # In the API's words.
  is_ours: bool  # True if the slice has our label with its own name.
  accelerator_type: str  # Empty if the API does not say.
  num_workers: int  # The number of machines; 0 until it has any.
  is_queued: bool  # True if the slice belongs to a queued resource.
  create_time: str = ""  # When its machines were made, in RFC 3339.

  def failure(self, name: str) -> Failure:
    """The failure of a verb that needs a ready slice."""
    return Failure(
      Exit.__members__.get(self.state.name, Exit.TIMEOUT),
      f"The slice {name} is {self.state.value}: {self.details}.",
    )


def from_api(
  request: dict[str, Any] | None,
  nodes: Sequence[dict[str, Any] | None],
  name: str,
) -> Slice:
  """Makes a slice from the API's queued resource and TPU VMs, if they exist.

  Several slices of one run are one slice here, in the state of the worst.
  """
  spec: dict[str, Any] = {}
  details = []
  state = State.ABSENT
  if request is not None:
    answer = request.get("state", {})
    state = _STATES.get(answer.get("state", ""), State.PENDING)
    details.append(f"the queued resource is {answer.get('state', 'new')}")
    error = answer.get("failedData", {}).get("error", {})
    details += filter(None, [error.get("message")])
    specs = request.get("tpu", {}).get("nodeSpec") or [{}]
    spec = specs[0].get("node", {})
  if found := [node for node in nodes if node is not None]:
    spec = found[0]
    names = [node.get("state", "new") for node in found]
    names += ["missing"] * (len(nodes) - len(found))
    details += [f"the TPU VM is {x}" for x in dict.fromkeys(names)]
    # A failed or suspended request explains more than its machines do.
    if state in (State.ABSENT, State.PENDING):
      states = [_STATES.get(x, State.PENDING) for x in names]
      state = max(states, key=list(State).index)
  return Slice(
    state=state,
    details=validation.printable("; ".join(details))
    or "no slice has this name",
    is_ours=spec.get("labels", {}).get(pod_settings.LABEL) == name,
    accelerator_type=spec.get("acceleratorType", ""),
    num_workers=sum(len(node.get("networkEndpoints", [])) for node in found),
    is_queued=request is not None,
    create_time=found[0].get("createTime", "") if found else "",
  )


def find(cloud: gcloud.Gcloud, *, assumed: State) -> Slice:
  """Looks for the slice in each zone; a dry run assumes its state."""
  settings = cloud.settings
  nodes, request = [], None
  for _ in cloud.zones_in_turn():
    nodes = [cloud.describe("tpu-vm", name) for name in settings.nodes]
    ready = {(node or {}).get("state") for node in nodes} == {"READY"}
    if cloud.dry_run:
      ready = assumed == State.READY
    if not ready:
      request = cloud.describe("queued-resources", settings.name)
    if request or any(nodes) or cloud.dry_run:
      break
  found = from_api(request, nodes, settings.name)
  if cloud.dry_run:
    shape = shapes.SHAPES.get(settings.accelerator_type)
    count = len(settings.nodes) * (shape.hosts if shape else 1)
    kind, is_queued = settings.accelerator_type, settings.request == "queued"
    found = Slice(assumed, "a dry run", True, kind, count, is_queued)
  cloud.num_workers = found.num_workers
  return found


def require_ready(cloud: gcloud.Gcloud) -> Slice:
  """Finds the slice and checks that it is ready."""
  found = find(cloud, assumed=State.READY)
  if found.state != State.READY:
    raise found.failure(cloud.settings.name)
  return found


def _require_ours(settings: pod_settings.Settings, found: Slice) -> None:
  if not found.is_ours:
    label = f"{pod_settings.LABEL}={settings.name}"
    message = f"The slice {settings.name} lacks the label {label} of ours."
    raise Failure(Exit.NOT_OURS, message)


def create(cloud: gcloud.Gcloud) -> None:
  """Requests the slice, unless it exists or is on its way."""
  settings = cloud.settings
  found = find(cloud, assumed=State.ABSENT)
  if found.state == State.ABSENT:
    _request(cloud)
    return
  _require_ours(settings, found)
  validation.require(
    found.accelerator_type == settings.accelerator_type,
    *("ACCELERATOR_TYPE", settings.accelerator_type),
    f"be that of {settings.name}, which exists ({found.accelerator_type!r})",
    "change it, choose another NAME, or `delete` the slice",
  )
  if found.state not in (State.READY, State.PENDING):
    raise found.failure(settings.name)
  logging.info("%s already exists: %s.", settings.name, found.details)


def _request(cloud: gcloud.Gcloud) -> None:
  """Requests the slice in the first zone that does not refuse it."""
  settings = cloud.settings
  refusals: list[Failure] = []
  for zone in cloud.zones_in_turn():
    try:
      cloud.tpus(*_create_words(settings))
      details = (settings.name, zone, settings.accelerator_type)
      logging.info("Requested %s in %s: %s.", *details)
      return
    except Failure as failure:
      if failure.exit not in (Exit.NO_CAPACITY, Exit.QUOTA):
        raise
      logging.warning("%s refuses the slice: %s", zone, failure)
      refusals.append(failure)
  # Capacity may come back; quota does not.
  raise min(refusals, key=lambda failure: failure.exit == Exit.QUOTA)


def _create_words(settings: pod_settings.Settings) -> list[str]:
  name, version = settings.name, settings.runtime_version
  if settings.request == "queued":
    # The TPU API names several TPU VMs after the queued resource.
    several = settings.num_slices != "1"
    count = f"--node-count={settings.num_slices}"
    words = ["queued-resources", "create", name]
    words += [count if several else f"--node-id={name}"]
    words += [f"--runtime-version={version}"]
    words += [f"--valid-until-duration={settings.valid_for}"]
  else:
    words = ["tpu-vm", "create", name, f"--version={version}"]
  words.append(f"--labels={settings.all_labels}")
  for setting, rule in pod_settings.RULES.items():
    value = getattr(settings, setting.lower())
    if value and "flag" in rule:
      words.append(f"--{rule['flag']}={value}")
    words += rule.get("flags", {}).get(value, [])
  if settings.reservation:
    words.remove("--reserved")  # It would take any reservation.
  if "--spot" in words and gcloud.is_alpha(words):
    # gcloud alpha would send "standard" together with --spot.
    words.append("--provisioning-model=spot")
  return words


def wait(
  cloud: gcloud.Gcloud,
  timeout_seconds: float,
  poll_seconds: float,
  sleep: Callable[[float], None] = time.sleep,
) -> Slice:
  """Waits until the slice is ready."""
  deadline = time.monotonic() + timeout_seconds
  while (found := find(cloud, assumed=State.READY)).state != State.READY:
    remaining = deadline - time.monotonic()
    if found.state != State.PENDING or remaining <= 0:
      raise found.failure(cloud.settings.name)
    sleep(min(poll_seconds, remaining))
  return found


def delete(cloud: gcloud.Gcloud) -> None:
  """Deletes the slice, or takes it out of the queue."""
  settings = cloud.settings
  found = find(cloud, assumed=State.READY)
  if found.state == State.ABSENT:
    logging.info("%s does not exist: nothing to delete.", settings.name)
    return
  _require_ours(settings, found)
  kind = "queued-resources"
  # Nobody has asked for the request of a ready slice.
  if found.is_queued or cloud.describe(kind, settings.name):
    cloud.tpus(kind, "delete", settings.name, "--force")
  else:
    cloud.tpus("tpu-vm", "delete", settings.name)
  logging.info("Deleted %s.", settings.name)
  # The next slice is tried in the next zone first.
  zones = settings.zones
  cloud.zone = zones[(zones.index(cloud.zone) + 1) % len(zones)]
