"""Hosts that share nothing but a bucket are the hosts that share a disk."""

import pytest

from tests.e2e import buckets
from tests.multihost import pods
from tests.multihost.pod_test import ALONE, FOUR, TWO, assert_same_run

pytestmark = [
  pytest.mark.multiprocess,
  pytest.mark.e2e,
  pytest.mark.nightly,
]


def on(topology: pods.Topology) -> dict:
  """The arguments of a start on these hosts."""
  flags = f"--xla_force_host_platform_device_count={topology.devices}"
  return {
    "hosts": topology.hosts,
    "XLA_FLAGS": "--xla_backend_optimization_level=0"
    f" --xla_llvm_disable_expensive_passes=true {flags}",
  }


def mesh(topology: pods.Topology) -> tuple[str, ...]:
  return (
    f"--config.mesh.fsdp={topology.fsdp}",
    f"--config.mesh.tensor={topology.tensor}",
  )


def test_two_hosts_are_killed_and_four_go_on_in_the_bucket(
  bucket, compiled, tmp_path
):
  """Each with a disk of its own, which is gone when the two are killed."""
  machine = pods.Machine(tmp_path, compiled)
  alone = pods.Pod(machine, tmp_path / "alone").finish(ALONE)
  data = buckets.upload(bucket, machine.data, "data")
  run = buckets.BucketRun(
    bucket,
    machine.environment,
    tmp_path / "machines",
    *(*pods.TINY, f"--config.data.dir={data}"),
  )
  start = run.start(*mesh(TWO), **on(TWO))
  start.wait_until(lambda: 2 in run.checkpoints())
  run.kill_at_put(start, 3)
  run.finish(*mesh(FOUR), **on(FOUR))
  copied = pods.Pod(machine, run.copy(tmp_path / "copy"))
  assert_same_run(copied, alone)
