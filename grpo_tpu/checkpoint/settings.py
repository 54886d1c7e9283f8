"""Settings of an export."""

from dataclasses import dataclass, field

from data_pipelines.validation import one_of, require_all, require_choices
from grpo_tpu.models.settings import DTYPES


@dataclass(frozen=True)
class ExportConfig:
  """The output of --mode=export.

  Attributes:
    step: Step of the workdir's checkpoint; None for the newest, or for
      `model.weights` if there is none.
    dtype: Type of all tensors.
    tokenizer_dir: Folder whose tokenizer and processor files are copied; ""
      takes those of an "hf:DIR" in `model.weights`.
    adapter: Export the adapters alone, in fp32 for peft, and do not merge them
      into the model.
  """

  step: int | None
  dtype: str = field(metadata=one_of(DTYPES))
  tokenizer_dir: str
  adapter: bool

  def __post_init__(self):
    require_choices(self, "export")
    require_all(
      self,
      "export",
      (
        "step",
        self.step is None or self.step >= 0,
        "be a step that was saved, or None for the newest",
        None,
      ),
    )
