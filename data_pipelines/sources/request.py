"""The request for a data dir: its source and its contents."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_pipelines import validation
from data_pipelines.sources import origin


@dataclass(frozen=True)
class Request:
  """The source and the contents of a data dir.

  The flags of `data_pipelines.prepare` of the same names say what they mean.
  """

  source: origin.Source
  data_dir: str
  seed: int = field(metadata=validation.at_least(0))
  eval_fraction: float = field(metadata=validation.interval("[0, 1]", 0.2))
  vocab_size: int
  max_reject_fraction: float = field(
    metadata=validation.interval("[0, 1)", 0.01)
  )
  columns: Mapping[str, str] = field(default_factory=dict)
  unchecked_answers: str = field(
    default="reject", metadata=validation.one_of(("reject", "keep"))
  )
  tolerance: float | None = field(
    default=None, metadata=validation.interval("[0, 1)", 0.05)
  )
  split: tuple[str, ...] = ()
  near_duplicates: str = field(
    default="exact",
    metadata=validation.one_of(("exact", "perceptual", "none")),
  )
  exclude: tuple[str, ...] = ()

  def __post_init__(self):
    with validation.user_errors():
      validation.check_fields(self)
      validation.to_path("data_dir", self.data_dir)
      if isinstance(self.source, str):
        validation.to_path("source", self.source)
