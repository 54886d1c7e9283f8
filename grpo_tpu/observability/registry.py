"""The metrics of a run, as declared in `metrics.toml`.

A metric that the file does not declare cannot be written. The file also says
on which chart of the dashboard a metric stands, and when it raises an alarm.
`python -m grpo_tpu.observability.registry > docs/metrics.md` writes the page.
"""

import dataclasses
import difflib
import functools
import math
import re
import sys

from data_pipelines.text import tables

_ANY_WORD = r"[\w.-]+"


@dataclasses.dataclass(frozen=True)
class Alarm:
  """The range in which a metric is healthy, limits included."""

  above: float = math.inf
  below: float = -math.inf
  own_samples: bool = False  # Limits only completions of the policy itself.

  @property
  def limit(self) -> float:
    """The limit that is set."""
    return self.below if math.isinf(self.above) else self.above

  def is_triggered(self, value: float) -> bool:
    """True if the value is outside of the range or is NaN."""
    return not self.below <= value <= self.above


@dataclasses.dataclass(frozen=True)
class Metric:
  """One metric; the head of `metrics.toml` explains the fields."""

  name: str
  unit: str
  meaning: str
  advice: str
  chart: str
  alarm: Alarm | None

  @property
  def pattern(self) -> str:
    """A regular expression that matches each name of the metric in full."""
    escaped = re.escape(self.name).replace(r"\{slice\}", _ANY_WORD)
    return escaped.replace(r"\{k\}", r"\d+")


@functools.cache
def metrics() -> tuple[Metric, ...]:
  """All metrics, in the order in which a line of `metrics.jsonl` has them."""
  rows = tables.read(__package__, "metrics.toml")["metrics"]
  made = []
  for name, fields in rows.items():
    alarm = Alarm(**fields["alarm"]) if "alarm" in fields else None
    made.append(Metric(name, **fields | {"alarm": alarm}))
  return tuple(made)


@functools.cache
def row_index(name: str) -> int:
  """The index in `metrics()` of the metric that covers a name.

  Raises a ValueError that suggests a similar name if no metric does.
  """
  names = [metric.name for metric in metrics()]
  if name in names and "{" not in name:
    return names.index(name)
  for index, metric in enumerate(metrics()):
    if "{" in metric.name and re.fullmatch(metric.pattern, name):
      return index
  close = difflib.get_close_matches(name, names, n=1)
  question = f" Did you mean {close[0]!r}?" if close else ""
  raise ValueError(
    f"metric {name!r} is not declared.{question} Declare a new metric in "
    "grpo_tpu/observability/metrics.toml."
  )


def page() -> str:
  """The text of `docs/metrics.md`: a table for each prefix of a name."""
  tables: dict[str, list[str]] = {}
  for metric in metrics():
    cells = (f"`{metric.name}`", metric.unit, metric.meaning, metric.advice)
    row = " | ".join(cell.replace("|", r"\|") for cell in cells)
    tables.setdefault(metric.name.split("/")[0], []).append(f"| {row} |")
  return _PREFACE + "".join(
    "\n".join((f"\n## {prefix}\n", *_TABLE_HEAD, *rows, ""))
    for prefix, rows in tables.items()
  )


_TABLE_HEAD = ("| name | unit | meaning | advice |", "|:--|:--|:--|:--|")
_PREFACE = """\
# Metrics

Every number that a run writes to `metrics.jsonl` and to TensorBoard. `{slice}`
stands for one word: a type of problem, or the name of a custom reward function;
`{k}` stands for a number.
Each `train/` and `rollout/` metric covers one step. Only `perf/` and
`checkpoint/` metrics differ between two runs of one seed. Some metrics have an
alarm: the log warns when the value crosses the limit in the advice. For several
curves together, see [reading the curves](reading-the-curves.md).

This page comes from `grpo_tpu/observability/metrics.toml`, by the command
`python -m grpo_tpu.observability.registry > docs/metrics.md`.
"""

if __name__ == "__main__":
  sys.stdout.write(page())
