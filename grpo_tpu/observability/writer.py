"""Where the numbers of a run are written, and its sample completions.

A `Writer` puts a step's scalars into `metrics.jsonl` (every digit, one line a
step) and into TensorBoard's event files, with the dashboard to see them on, and
sample completions beside them. It knows nothing of how a number comes about;
`metrics.toml` declares their names.

A line of `metrics.jsonl` is `{"step": 7, "train/loss": -0.1, ...}`, the names
in the order of that table; a number that is not finite is `null`, since JSON
has no NaN. The file never holds a step twice: a resumed run takes back the
steps after the checkpoint it starts from.
"""

import collections
import dataclasses
import json
import math
import os
import pathlib
import time
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self

import jax
import numpy as np
from absl import logging

from grpo_tpu.observability import captions, dashboard, event_files, registry

type Scalar = bool | int | float | np.generic | np.ndarray | jax.Array
type Scalars = dict[str, Scalar]


# Where TensorBoard shows a sample: its words and its picture need a tag each.
_SAMPLE_TEXT = "samples/{split}/{index}/text"
_SAMPLE_IMAGE = "samples/{split}/{index}/image"

# The progress line: which metrics, under which words.
_PROGRESS = (
  ("rollout/reward", "reward {:.2f}"),
  ("rollout/accuracy", "accuracy {:.2f}"),
  ("train/nll", "nll {:.3f}"),
  ("train/implicit_preference_accuracy", "preference {:.2f}"),
  ("eval/accuracy", "held-out accuracy {:.3f}"),
  ("eval/implicit_preference_accuracy", "held-out preference {:.3f}"),
  ("perf/tokens_per_second", "{:.0f} tokens/s"),
)
_SECONDS_BETWEEN_PROGRESS_LINES = 5.0
_SECONDS_BETWEEN_COMPLAINTS = 60.0
_MAX_WAITING_LINES = 1000


@dataclasses.dataclass(frozen=True)
class Sample:
  """A completion to look at.

  Attributes:
    pid: Of the problem.
    prompt: As the model read it.
    completion: As the model wrote it.
    answer: The right one.
    reward: The weighted total.
    rewards: Each reward by name, before its weight.
    image: uint8 [H, W, 3], or None for a problem without one. It goes into the
      event file alone; in the JSON line the pid stands for it.
  """

  pid: str
  prompt: str
  completion: str
  answer: str
  reward: float
  rewards: Mapping[str, float]
  image: np.ndarray | None


class Writer:
  """Writes a run's numbers under `workdir`; on hosts but one, nothing.

  Once it is open, no disk that is full and no file that may not be written
  stops the run: failures are counted, and logged now and then.

  Use as a context manager: leaving it waits until all is written.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    is_writer: bool,
    resume_step: int | None,
    has_partial_step: bool = False,
  ) -> None:
    """Opens the files, and takes back what a resumed run will write again.

    Args:
      workdir: Of the run, made if missing.
      is_writer: True on process 0. The others check names and write nothing.
      resume_step: The step of the restored checkpoint: what was written after
        it is dropped, as is a last line cut short by a kill. None for a run
        from the start: what an earlier one left is removed.
      has_partial_step: Whether the run goes on in the middle of the step after,
        whose samples are written already, and its line is not.
    """
    self._lines: dict[str, _JsonLines] = {}
    self._events: event_files.EventFiles | None = None
    self._last_step = -1 if resume_step is None else resume_step
    self._progress_start: tuple[int, float] | None = None
    self._progress_time = -math.inf
    self._scalars: dict[str, int | float] = {}
    if is_writer:
      workdir = pathlib.Path(workdir)
      (workdir / "samples").mkdir(parents=True, exist_ok=True)
      sampled = None if resume_step is None else resume_step + has_partial_step
      for name in ("metrics", "samples/train", "samples/eval"):
        self._lines[name] = _JsonLines(
          workdir / f"{name}.jsonl",
          resume_step=sampled if name == "samples/train" else resume_step,
        )
      self._events = event_files.EventFiles(workdir, resume_step=sampled)

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: types.TracebackType | None,
  ) -> None:
    self.close()

  def write(self, step: int, scalars: Mapping[str, Scalar]) -> None:
    """Writes everything there is to say about `step`: called once for each.

    Args:
      step: Greater than every step before.
      scalars: Values by metric name. Device arrays are fetched.

    Raises:
      ValueError: A name that is not in the table, a value that is not one
        number, or a step already written.
    """
    order = {name: registry.row_index(name) for name in scalars}
    if step <= self._last_step:
      raise ValueError(
        f"step {step} is written after step {self._last_step}: merge what there"
        " is to say about a step into one call."
      )
    self._last_step = step
    if self._events is None:
      return
    fetched = jax.device_get(dict(scalars))
    self._scalars = {
      name: _number(name, fetched[name])
      for name in sorted(scalars, key=lambda name: (order[name], name))
    }
    self._lines["metrics"].append({"step": step} | self._scalars)
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
    """Writes completions to `samples/<split>.jsonl` and the event files."""
    if self._events is None:
      return
    for sample in samples:
      self._lines[f"samples/{split}"].append(
        {
          "step": step,
          "pid": sample.pid,
          "prompt": sample.prompt,
          "completion": sample.completion,
          "answer": sample.answer,
          "reward": float(sample.reward),
          "rewards": {k: float(v) for k, v in sample.rewards.items()},
        }
      )
    texts = {
      _SAMPLE_TEXT.format(split=split, index=index): sample_text(sample)
      for index, sample in enumerate(samples)
    }
    images = {
      _SAMPLE_IMAGE.format(split=split, index=index): captions.captioned(
        sample.image, _caption(sample)
      )
      for index, sample in enumerate(samples)
      if sample.image is not None
    }
    self._events.write(lambda events: events.write_texts(step, texts))
    self._events.write(lambda events: events.write_images(step, images))

  def write_config(self, config: Mapping[str, Any]) -> None:
    """Puts the run's settings into the event files, and its dashboard."""
    if self._events is None:
      return
    step = max(self._last_step, 0)
    text = _as_code(json.dumps(config, indent=2, default=str))
    hparams = dict(_flat(config))
    self._events.write(
      lambda events: events.write_texts(step, {"config": text})
    )
    self._events.write(lambda events: events.write_hparams(hparams))
    self._events.write(lambda events: dashboard.write(events, step))

  def progress(self, num_steps: int) -> None:
    """Logs a line about the step just written, unless one was logged just now.

    Always logs the first step, the last, and those that were evaluated.
    """
    if self._events is None:
      return
    step, now = self._last_step, time.monotonic()
    if step > 0 and self._progress_start is None:
      # Step 0 trains nothing, and the first after it compiles.
      self._progress_start = (step, now)
    is_due = (
      now - self._progress_time >= _SECONDS_BETWEEN_PROGRESS_LINES
      or step >= num_steps
      or any(name.startswith("eval/") for name in self._scalars)
    )
    if not is_due:
      return
    self._progress_time = now
    first_step, start = self._progress_start or (step, now)
    eta_seconds = None
    if step > first_step:
      eta_seconds = (num_steps - step) * (now - start) / (step - first_step)
    logging.info(
      "%s",
      progress_line(step, num_steps, self._scalars, eta_seconds=eta_seconds),
    )

  @property
  def failures(self) -> int:
    """How many writes have failed so far, which never stops a run."""
    if self._events is None:
      return 0
    lines = sum(each.failures for each in self._lines.values())
    return lines + self._events.failures

  def flush(self) -> None:
    """Returns when all is on disk that can be written."""
    if self._events is not None:
      self._events.flush()

  def close(self) -> None:
    """Flushes and closes; nothing can be written after."""
    for lines in self._lines.values():
      lines.close()
    if self._events is not None:
      self._events.close()


def progress_line(
  step: int,
  num_steps: int,
  scalars: Mapping[str, float],
  *,
  eta_seconds: float | None,
) -> str:
  """One line to watch a run by, of those `scalars` that are worth a look.

  Args:
    step: The one just done.
    num_steps: How many there are.
    scalars: Values of this step by metric name.
    eta_seconds: Until the last step is done; None while unknown.
  """
  parts = [f"step {step}/{num_steps}"]
  parts += [
    words.format(scalars[name]) for name, words in _PROGRESS if name in scalars
  ]
  if eta_seconds is not None:
    minutes, seconds = divmod(round(eta_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    parts.append(f"ETA {clock}:{seconds:02}")
  return "  ".join(parts)


def sample_text(sample: Sample) -> str:
  """A sample as the Markdown that TensorBoard shows."""
  rewards = ", ".join(f"{k} {v:.2f}" for k, v in sample.rewards.items())
  return "\n\n".join(
    (
      f"**{sample.pid}**: reward {sample.reward:.3f} ({rewards})",
      "right answer:",
      _as_code(sample.answer),
      "completion:",
      _as_code(sample.completion),
      "prompt:",
      _as_code(sample.prompt),
    )
  )


def _caption(sample: Sample) -> Sequence[str]:
  """What stands under a sample's picture, a text a line."""
  return (
    f"right answer: {sample.answer}",
    f"reward {sample.reward:.2f}:",
    sample.completion,
  )


class _JsonLines:
  """A file of one JSON object a line, each with the step it belongs to.

  What cannot be written now waits and is tried again before the next line.

  Attributes:
    failures: How often something could not be written.
  """

  def __init__(self, path: pathlib.Path, *, resume_step: int | None) -> None:
    _rewind(path, resume_step)
    # Unbuffered: a line is one write, so a kill leaves at most the last torn.
    self._file = path.open("ab", buffering=0)
    self._size = os.fstat(self._file.fileno()).st_size
    self._waiting: collections.deque[bytes] = collections.deque(
      maxlen=_MAX_WAITING_LINES
    )
    self.failures = 0

  def append(self, row: Mapping[str, Any]) -> None:
    line = json.dumps(_finite(row), allow_nan=False).encode() + b"\n"
    self._waiting.append(line)
    try:
      while self._waiting:
        self._write(self._waiting[0])
        self._waiting.popleft()
    except OSError as error:
      self.failures += 1
      logging.log_every_n_seconds(
        logging.WARNING,
        "%s: %d lines wait to be written: %s",
        _SECONDS_BETWEEN_COMPLAINTS,
        self._file.name,
        len(self._waiting),
        error,
      )

  def _write(self, line: bytes) -> None:
    """Writes a line whole, or raises OSError and leaves none of it for long."""
    descriptor = self._file.fileno()
    if os.fstat(descriptor).st_size != self._size:
      os.ftruncate(descriptor, self._size)  # Part of a line that failed.
    num_written = self._file.write(line)
    if num_written != len(line):
      raise OSError(
        f"only {num_written} of {len(line)} bytes of a line could be written;"
        " is the disk full?"
      )
    self._size += len(line)

  def close(self) -> None:
    self._file.close()


def _rewind(path: pathlib.Path, resume_step: int | None) -> None:
  """Leaves the whole lines up to `resume_step` in the file; none if None."""
  kept = []
  if resume_step is not None and path.exists():
    for line in path.read_bytes().splitlines(keepends=True):
      try:
        step = json.loads(line)["step"]
      except ValueError:
        step = None
      if step is None or not line.endswith(b"\n"):
        logging.warning("%s: dropped a broken line: %r", path, line[:80])
      elif step <= resume_step:
        kept.append(line)
  # Beside, then renamed: a kill in between leaves the file as it was.
  beside = path.with_name(f"{path.name}.tmp")
  with beside.open("wb") as file:
    file.writelines(kept)
    file.flush()
    os.fsync(file.fileno())
  beside.replace(path)


def _number(name: str, value: Any) -> int | float:
  array = np.asarray(value)
  number = array.item() if array.ndim == 0 else None
  if not isinstance(number, int | float):
    raise ValueError(
      f"metric {name!r} must be one number, not {array.dtype}{array.shape}:"
      " reduce it before it is written."
    )
  return int(number) if isinstance(number, bool) else number


def _finite(value: Any) -> Any:
  """The same, with null for every number that JSON cannot hold."""
  if isinstance(value, Mapping):
    return {key: _finite(each) for key, each in value.items()}
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _flat(config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
  """Dotted names and what the hparams tab can show: numbers and text."""
  for name, value in config.items():
    if isinstance(value, Mapping):
      for rest, each in _flat(value):
        yield f"{name}.{rest}", each
    else:
      is_plain = isinstance(value, bool | int | float | str)
      yield name, value if is_plain else str(value)


def _as_code(text: str) -> str:
  """Markdown that shows `text` as it is, tags and fences included."""
  return "\n".join(f"    {line}" for line in text.split("\n"))
