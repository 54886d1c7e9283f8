"""The layout of TensorBoard's Custom Scalars tab.

The layout travels in the event files, so nobody has to set anything up.
`metrics.toml` says which metrics share a chart. A run shows the charts of the
metrics that it has written.
"""

import dataclasses
import functools
import re
from collections.abc import Collection
from typing import Any

from grpo_tpu.observability import registry


@dataclasses.dataclass(frozen=True)
class Chart:
  """Curves that are read together."""

  title: str
  metrics: tuple[registry.Metric, ...]

  @property
  def patterns(self) -> list[str]:
    """Regular expressions for the names of the curves, each matched once."""
    sliced = [x.pattern for x in self.metrics if "{" in x.name]
    return [
      f"^{metric.pattern}$"
      for metric in self.metrics
      if not any(re.fullmatch(pattern, metric.name) for pattern in sliced)
    ]


@functools.cache
def sections() -> dict[str, list[Chart]]:
  """All charts of each section, from top to bottom."""
  by_chart: dict[str, list[registry.Metric]] = {}
  for metric in registry.metrics():
    by_chart.setdefault(metric.chart, []).append(metric)
  return {
    section: [Chart(title, tuple(by_chart[title])) for title in titles]
    for section, titles in registry.chart_titles().items()
  }


def charts_of(names: Collection[str]) -> dict[str, list[Chart]]:
  """The charts on which metrics of these names have a curve."""
  rows = {
    registry.metrics()[registry.row_index(name)]
    for name in filter(registry.is_declared, names)
  }
  found = {
    section: [chart for chart in charts if rows.intersection(chart.metrics)]
    for section, charts in sections().items()
  }
  return {section: charts for section, charts in found.items() if charts}


def write(events: Any, step: int, charts: dict[str, list[Chart]]) -> None:
  """Writes the layout with a CLU writer; TensorBoard shows the newest one."""
  from tensorboard.plugins.custom_scalar import layout_pb2, metadata

  messages: Any = layout_pb2  # Generated on import, unknown to type checkers.
  layout = messages.Layout()
  for title, members in charts.items():
    category = layout.category.add(title=title)
    for chart in members:
      curves = messages.MultilineChartContent(tag=chart.patterns)
      category.chart.add(title=chart.title, multiline=curves)
  tag = metadata.CONFIG_SUMMARY_TAG
  events.write_summaries(
    step,
    {tag: layout.SerializeToString()},
    {tag: metadata.create_summary_metadata()},
  )
