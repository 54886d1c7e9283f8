"""A slice is requested where there is room, and found where it is."""

import itertools
import json

import pytest

from launch.pod import gcloud, slices
from launch.pod.exits import Exit, Failure
from tests.launch.pod import fake_cloud

State = slices.State
ZONES = ("us-east5-a", "us-east5-b", "europe-west4-b")


class Cloud(gcloud.Gcloud):
  """Keeps slices by zone and name, instead of calling gcloud.

  Attributes:
    refusals: Exit codes of creations, by zone.
    held: The states of queued resources and TPU VMs by zone and name.
    calls: The command and the zone of each call that changes something.
  """

  def __init__(self, **changes: str):
    super().__init__(
      fake_cloud.settings(**{"ZONE": ",".join(ZONES)} | changes), dry_run=False
    )
    self.refusals: dict[str, Exit] = {}
    self.held: dict[tuple[str, str, str], str] = {}
    self.calls: list[tuple[str, str]] = []

  def tpus(self, *words: str) -> str:
    kind, action, name = words[:3]
    if action == "describe":
      state = self.held.get((self.zone, kind, name))
      if state is None:
        raise Failure(Exit.ABSENT, f"no {name}")
      node = {"labels": {"grpo-tpu": self.settings.name}, "state": state}
      node["acceleratorType"] = self.settings.accelerator_type
      node["networkEndpoints"] = [{}, {}]
      request = {
        "state": {"state": state},
        "tpu": {"nodeSpec": [{"node": node}]},
      }
      return json.dumps(node if kind == "tpu-vm" else request)
    self.calls.append((action, self.zone))
    if action == "create" and self.zone in self.refusals:
      raise Failure(self.refusals[self.zone], "no")
    if action == "create":
      self.held[self.zone, kind, name] = "WAITING_FOR_RESOURCES"
    else:
      del self.held[self.zone, kind, name]
    return ""


def find(cloud: Cloud) -> slices.Slice:
  return slices.find(cloud, assumed=State.READY)


@pytest.mark.parametrize("kind", [Exit.NO_CAPACITY, Exit.QUOTA])
def test_zones_are_tried_in_turn_while_they_refuse(kind):
  cloud = Cloud()
  cloud.refusals = {ZONES[0]: kind, ZONES[1]: kind}
  slices.create(cloud)
  assert cloud.calls == [("create", zone) for zone in ZONES]
  assert cloud.zone == ZONES[2]


def test_any_other_refusal_ends_the_search():
  cloud = Cloud()
  cloud.refusals = {ZONES[0]: Exit.NOT_ALLOWED}
  with pytest.raises(Failure) as raised:
    slices.create(cloud)
  assert raised.value.exit == Exit.NOT_ALLOWED and len(cloud.calls) == 1


@pytest.mark.parametrize(
  "kinds",
  [*itertools.permutations([Exit.QUOTA, Exit.NO_CAPACITY, Exit.QUOTA])],
)
def test_capacity_in_one_zone_is_worth_a_wait(kinds):
  cloud = Cloud()
  cloud.refusals = dict(zip(ZONES, kinds, strict=True))
  with pytest.raises(Failure) as raised:
    slices.create(cloud)
  assert raised.value.exit == Exit.NO_CAPACITY


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("start", ZONES)
def test_a_slice_is_found_in_any_zone(zone, start):
  cloud = Cloud()
  cloud.zone = start
  cloud.held[zone, "tpu-vm", "grpo-1"] = "READY"
  assert slices.require_ready(cloud).num_workers == 2
  assert cloud.zone == zone


def test_after_a_slice_was_taken_away_the_next_zone_comes_first():
  cloud = Cloud()
  for _ in range(4):
    slices.create(cloud)
    slices.delete(cloud)
    assert find(cloud).state == State.ABSENT
  actions = [zone for action, zone in cloud.calls if action == "create"]
  assert actions == [*ZONES, ZONES[0]]


@pytest.mark.parametrize(
  "states, state, num_workers",
  [
    (("READY", "READY"), State.READY, 4),
    (("READY", "CREATING"), State.PENDING, 4),
    (("READY", None), State.PENDING, 2),
    (("READY", "PREEMPTED"), State.PREEMPTED, 4),
    (("CREATING", "PREEMPTED"), State.PREEMPTED, 4),
  ],
)
def test_slices_of_one_run_are_ready_together(states, state, num_workers):
  for order in (states, states[::-1]):
    cloud = Cloud(NUM_SLICES="2")
    cloud.held = {
      (ZONES[0], "tpu-vm", f"grpo-1-{k}"): x for k, x in enumerate(order) if x
    }
    cloud.held[ZONES[0], "queued-resources", "grpo-1"] = "ACTIVE"
    found = find(cloud)
    assert (found.state, found.num_workers) == (state, num_workers)


def test_workers_of_several_slices_are_counted_through():
  cloud = Cloud(NUM_SLICES="2")
  for k in range(2):
    cloud.held[ZONES[0], "tpu-vm", f"grpo-1-{k}"] = "READY"
  assert slices.require_ready(cloud).num_workers == 4
  assert [cloud.ssh_call(k, ["true"])[5:7] for k in range(4)] == [
    ["grpo-1-0", "--worker=0"],
    ["grpo-1-0", "--worker=1"],
    ["grpo-1-1", "--worker=0"],
    ["grpo-1-1", "--worker=1"],
  ]
