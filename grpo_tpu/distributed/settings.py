"""Settings of the mesh and of the processes that share it."""

from dataclasses import dataclass, field

from data_pipelines.validation import (
  at_least,
  check_fields,
  interval,
  require_all,
)


@dataclass(frozen=True)
class MeshConfig:
  """The devices along each mesh axis; their product is the device count.

  Attributes:
    replica: Copies of the model, one for each slice; the network between slices
      carries gradients alone.
    fsdp: Parts that parameters, optimizer state and the batch are cut into.
    tensor: Parts that heads, hidden width and vocabulary are cut into.
  """

  replica: int = field(metadata=interval("[1, 65536]", 1))
  fsdp: int = field(metadata=interval("[1, 65536]", 1))
  tensor: int = field(metadata=interval("[1, 65536]", 1))

  def __post_init__(self):
    check_fields(self, "mesh")


@dataclass(frozen=True)
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

  initialization_timeout_seconds: int = field(metadata=at_least(1))
  heartbeat_timeout_seconds: int = field(metadata=at_least(1))
  shutdown_timeout_seconds: int = field(metadata=at_least(1))
  preflight_timeout_seconds: int = field(metadata=at_least(1))
  watchdog_seconds: float = field(metadata=interval("[0, inf)", 0.0))
  watchdog_start_seconds: float = field(metadata=interval("[0, inf)", 0.0))

  def __post_init__(self):
    check_fields(self, "distributed")
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
