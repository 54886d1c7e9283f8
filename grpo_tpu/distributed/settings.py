"""Settings of the mesh and of the processes that share it."""

import dataclasses

from data_pipelines.validation import require_all, require_at_least


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """The devices along each mesh axis; their product is the device count.

  Attributes:
    replica: Copies of the model, one for each slice; the network between slices
      carries gradients alone.
    fsdp: Parts that parameters, optimizer state and the batch are cut into.
    tensor: Parts that heads, hidden width and vocabulary are cut into.
  """

  replica: int
  fsdp: int
  tensor: int

  def __post_init__(self):
    require_at_least(self, "mesh", replica=1, fsdp=1, tensor=1)


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """Time limits for the processes of a run, in seconds.

  Attributes:
    initialization_timeout_seconds: Limit for all processes to join. After it,
      JAX ends the waiting processes with SIGABRT.
    heartbeat_timeout_seconds: Silence after which a process counts as dead and
      JAX ends the others.
    shutdown_timeout_seconds: Limit for all processes to reach the end.
    preflight_timeout_seconds: Limit for all processes to send what they are
      about to run.
    watchdog_seconds: Time without progress after which a process dumps the
      stacks of its threads and exits with 76; 0 for never.
    watchdog_start_seconds: This limit until the end of the first step, which
      compiles.
  """

  initialization_timeout_seconds: int
  heartbeat_timeout_seconds: int
  shutdown_timeout_seconds: int
  preflight_timeout_seconds: int
  watchdog_seconds: float
  watchdog_start_seconds: float

  def __post_init__(self):
    for field in dataclasses.fields(self):
      least = 0 if field.name.startswith("watchdog") else 1
      holds = least <= getattr(self, field.name) < float("inf")
      rule = f"be at least {least} and finite, in seconds"
      require_all(self, "distributed", (field.name, holds, rule, 60))
    require_all(
      self,
      "distributed",
      (
        "watchdog_start_seconds",
        self.watchdog_seconds <= self.watchdog_start_seconds,
        f"be at least distributed.watchdog_seconds ({self.watchdog_seconds!r}),"
        " because the first step compiles",
        self.watchdog_seconds,
      ),
    )
