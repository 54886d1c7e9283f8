"""The request for a data dir: its source and its contents."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from data_pipelines import validation
from data_pipelines.sources import origin


@dataclass(frozen=True)
class Request:
  """The source and the contents of a data dir.

  Attributes:
    source: The settings of synthetic or reasoning_gym's problems, a path that
      `files` can read, or such a path for each of `train`, `eval` and `test`.
    data_dir: The folder to build.
    seed: Another seed is another division into train and eval.
    eval_fraction: Expected share of the answered images that `eval` gets; 0
      makes no `eval`, 1 no `train`.
    vocab_size: Largest number of pieces of the tokenizer.
    max_reject_fraction: Largest share of unusable records.
    columns: The source's column for each of ours that is not to be guessed.
    unchecked_answers: "keep" keeps records whose answer no rule can check.
    tolerance: Largest relative error of a right number; None for the source's.
    split: Names of the source's splits to divide, or `train=NAME` and
      `eval=NAME` to keep them; () follows their names.
    near_duplicates: Images that are withheld from `train` because of `eval`:
      "exact" copies, "perceptual" for look-alikes too, or "none".
    exclude: Data dirs; what also stands in one of them never trains.
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
