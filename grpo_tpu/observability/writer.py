"""Writes the metrics and the completions of a run.

The metrics of a step are a line of `metrics.jsonl`, `{"step": 7, "train/loss":
-0.1, ...}`, with every digit, in the order of `metrics.toml`, and `null` for a
number that is not finite. They go into TensorBoard's event files too. All
completions of a step go into `samples/`, and a few into the event files.
"""

import contextlib
import json
import math
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from absl import logging

from data_pipelines.validation import printable
from grpo_tpu.distributed import fingerprint
from grpo_tpu.observability import captions, dashboard, event_files, registry
from grpo_tpu.observability.json_lines import JsonLines
from grpo_tpu.observability.sample_files import Sample, SampleFiles

type Scalar = bool | int | float | np.generic | np.ndarray | jax.Array
type Scalars = dict[str, Scalar]

# The metrics of a progress line, with their format.
_PROGRESS = (
  ("rollout/reward", "reward {:.2f}"),
  ("rollout/accuracy", "accuracy {:.2f}"),
  ("train/nll", "nll {:.3f}"),
  ("train/implicit_preference_accuracy", "preference {:.2f}"),
  ("train/pairwise_accuracy", "pairs {:.2f}"),
  ("eval/accuracy", "eval accuracy {:.3f}"),
  ("eval/implicit_preference_accuracy", "eval preference {:.3f}"),
  ("eval/pairwise_accuracy", "eval pairs {:.3f}"),
  ("perf/tokens_per_second", "{:.0f} tokens/s"),
)
_SECONDS_BETWEEN_PROGRESS_LINES = 5.0


class Writer(contextlib.AbstractContextManager["Writer"]):
  """Writes metrics and samples below `workdir`, on process 0 alone.

  An error of the disk never stops the run once the files are open: failures are
  counted and logged. A context manager, which waits until all is written.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    is_writer: bool,
    resume_step: int | None,
    has_partial_step: bool = False,
    is_mirrored: bool = False,
  ) -> None:
    """Opens the files and removes what a resumed run will write again.

    Steps after the restored `resume_step` are removed, and a last line that a
    kill cut short; None removes everything. Inside of a partial step the next
    step's samples are written already. Without `is_writer` the names of metrics
    are checked, and nothing is written. With `is_mirrored` the event files are
    kept small, as a `Mirror` copies them.
    """
    self._lines: JsonLines | None = None
    self._samples: SampleFiles | None = None
    self._events: event_files.EventFiles | None = None
    self._is_mirrored = is_mirrored
    self._last_step = -1 if resume_step is None else resume_step
    self._progress_start: tuple[int, float] | None = None
    self._progress_time = -math.inf
    self._scalars: dict[str, int | float] = {}
    self._charts: dashboard.Charts = {}
    if is_writer:
      workdir = pathlib.Path(workdir)
      sampled = None if resume_step is None else resume_step + has_partial_step
      self._samples = SampleFiles(workdir / "samples", resume_step=sampled)
      path = workdir / "metrics.jsonl"
      self._lines = JsonLines(path, resume_step=resume_step)
      self._events = event_files.EventFiles(workdir, resume_step=sampled)
    files = (self._lines, self._samples, self._events)
    self._files = [file for file in files if file]

  def __exit__(self, *_: object) -> None:
    self.close()

  def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
    """Writes all metrics of a step in one call; steps must ascend.

    Raises a ValueError for a name that is not declared, or no number.
    """
    order = {name: registry.row_index(name) for name in scalars}
    if step <= self._last_step:
      raise ValueError(
        f"step {step} is written after step {self._last_step}: write all "
        "metrics of a step in one call."
      )
    self._last_step = step
    if self._lines is None or self._events is None:
      return
    fetched = jax.device_get(dict(scalars))
    self._scalars = {
      name: _to_number(name, fetched[name])
      for name in sorted(scalars, key=lambda name: (order[name], name))
    }
    self._lines.append({"step": step} | self._scalars)
    charts = dashboard.charts_of(self._lines.names)
    if charts != self._charts:
      self._charts = charts
      self._events.write(lambda events: dashboard.write(events, step, charts))
    self._events.write(
      lambda events, scalars=self._scalars: events.write_scalars(step, scalars)
    )

  def write_samples(
    self,
    step: int,
    samples: Sequence[Sample],
    *,
    split: Literal["train", "eval"],
  ) -> None:
    """Writes the completions of a training step, and shows some of a split."""
    if self._samples is None or self._events is None:
      return
    if split == "train" and samples:
      self._samples.write(step, [sample.columns for sample in samples])
    if shown := [x for x in samples if x.question is not None]:
      self._events.write(lambda events: _show(events, step, shown, split))

  def flush(self) -> None:
    """Waits until the completions written so far are on the disk.

    Waits for the curves too if they are mirrored.
    """
    if self._samples:
      self._samples.flush()
    if self._events and self._is_mirrored:
      self._events.roll()
      self._events.flush()

  def write_config(self, config: Mapping[str, Any]) -> None:
    """Writes the settings into the event files."""
    if self._events is None:
      return
    step = max(self._last_step, 0)
    text = _code_block(json.dumps(config, indent=2, default=str))
    hparams = {
      # The hparams tab takes numbers and text.
      name: value if isinstance(value, bool | int | float) else str(value)
      for name, value in fingerprint.flatten(config).items()
    }
    self._events.write(lambda x: x.write_texts(step, {"config": text}))
    self._events.write(lambda x: x.write_hparams(hparams))

  def log_progress(self, num_steps: int) -> None:
    """Logs a line about the step just written, at most every few seconds.

    The first step, the last and those with an evaluation are always logged.
    """
    if self._events is None:
      return
    step, now = self._last_step, time.monotonic()
    if step > 0 and self._progress_start is None:
      # Step 0 trains nothing, and the step after it compiles.
      self._progress_start = (step, now)
    is_due = now - self._progress_time >= _SECONDS_BETWEEN_PROGRESS_LINES
    is_evaluated = any(name.startswith("eval/") for name in self._scalars)
    if not (is_due or is_evaluated or step >= num_steps):
      return
    self._progress_time = now
    first_step, start = self._progress_start or (step, now)
    eta = None
    if step > first_step:
      eta = (num_steps - step) * (now - start) / (step - first_step)
    line = progress_line(step, num_steps, self._scalars, eta_seconds=eta)
    logging.info("%s", line)

  @property
  def failures(self) -> int:
    """The number of failed writes, none of which stopped the run."""
    return sum(file.failures for file in self._files)

  def close(self) -> None:
    """Waits until everything is written and closes the files."""
    for file in self._files:
      file.close()


def progress_line(
  step: int,
  num_steps: int,
  scalars: Mapping[str, float],
  *,
  eta_seconds: float | None,
) -> str:
  """The text of a progress line; without ETA if `eta_seconds` is None."""
  parts = [f"step {step}/{num_steps}"]
  parts += [
    text.format(scalars[name]) for name, text in _PROGRESS if name in scalars
  ]
  if eta_seconds is not None:
    minutes, seconds = divmod(round(eta_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    parts.append(f"ETA {clock}:{seconds:02}")
  return "  ".join(parts)


def _show(
  events: Any, step: int, samples: Sequence[Sample], split: str
) -> None:
  """Writes samples as texts and captioned images, with a CLU writer."""
  texts, images = {}, {}
  for index, sample in enumerate(samples):
    tag, columns = f"samples/{split}/{index}", sample.columns
    texts[f"{tag}/text"] = sample_text(sample)
    if sample.image is not None:
      words = (
        sample.question or "",
        f"right answer: {columns['answer']}",
        f"{_verdict(columns)}:",
        columns["completion"],
      )
      images[f"{tag}/image"] = captions.add_caption(sample.image, words)
  events.write_texts(step, texts)
  events.write_images(step, images)


def sample_text(sample: Sample) -> str:
  """A sample as Markdown; its own text stands in code blocks, as it is."""
  columns = sample.columns
  rewards = ", ".join(
    f"{name.removeprefix('reward/')} {value:.2f}"
    for name, value in columns.items()
    if name.startswith("reward/")
  )
  head = f"{columns['pid']}: {_verdict(columns)} ({rewards})"
  parts = [_code_block(head)]
  parts += ["right answer:", _code_block(columns["answer"])]
  parts += ["completion:", _code_block(columns["completion"])]
  parts += ["question:", _code_block(sample.question or "")]
  return "\n\n".join(parts)


def _verdict(columns: Mapping[str, Any]) -> str:
  """The reward and the advantage, of those that a completion has."""
  numbers = ((name, columns.get(name)) for name in ("reward", "advantage"))
  return ", ".join(f"{name} {x:.3f}" for name, x in numbers if x is not None)


def _to_number(name: str, value: Any) -> int | float:
  array = np.asarray(value)
  number = array.item() if array.ndim == 0 else None
  if not isinstance(number, int | float):
    raise ValueError(
      f"metric {name!r} must be one number, not {array.dtype}{array.shape}: "
      "reduce it before it is written."
    )
  return int(number) if isinstance(number, bool) else number


def _code_block(text: str) -> str:
  """Indents text so that Markdown shows it literally, tags and fences too.

  Other line breaks than this one would end the block, so they are escaped.
  """
  lines = printable(text, keep="\n\t").split("\n")
  return "\n".join(f"    {line}" for line in lines)
