"""The layout of TensorBoard's Custom Scalars tab.

The layout travels in the event files, so nobody has to set anything up.
`metrics.toml` says which metrics share a chart. A run shows the charts of the
metrics that it has written.
"""

import contextlib
import functools
import re
from collections.abc import Collection, Sequence
from typing import Any

from data_pipelines.text import tables
from grpo_tpu.observability import registry

# The metrics of each chart by section and title, from top to bottom.
Charts = dict[str, dict[str, list[registry.Metric]]]


@functools.cache
def sections() -> Charts:
  """All charts."""
  titles = tables.read(__package__, "metrics.toml")["charts"]
  return {
    section: {
      title: [x for x in registry.metrics() if x.chart == title]
      for title in charts
    }
    for section, charts in titles.items()
  }


def charts_of(names: Collection[str]) -> Charts:
  """The charts on which metrics of these names have a curve."""
  shown = set()
  for name in names:
    with contextlib.suppress(ValueError):  # A name of another version.
      shown.add(registry.metrics()[registry.row_index(name)].chart)
  found = {
    section: {title: x for title, x in charts.items() if title in shown}
    for section, charts in sections().items()
  }
  return {section: charts for section, charts in found.items() if charts}


def patterns(metrics: Sequence[registry.Metric]) -> list[str]:
  """Regular expressions for the names of the curves, each matched once."""
  sliced = [x.pattern for x in metrics if "{" in x.name]
  return [
    f"^{metric.pattern}$"
    for metric in metrics
    if not any(re.fullmatch(pattern, metric.name) for pattern in sliced)
  ]


def write(events: Any, step: int, charts: Charts) -> None:
  """Writes the layout with a CLU writer; TensorBoard shows the newest one."""
  from tensorboard.plugins.custom_scalar import layout_pb2, metadata

  messages: Any = layout_pb2  # Generated on import, unknown to type checkers.
  layout = messages.Layout()
  for section, members in charts.items():
    category = layout.category.add(title=section)
    for title, metrics in members.items():
      curves = messages.MultilineChartContent(tag=patterns(metrics))
      category.chart.add(title=title, multiline=curves)
  tag = metadata.CONFIG_SUMMARY_TAG
  events.write_summaries(
    step,
    {tag: layout.SerializeToString()},
    {tag: metadata.create_summary_metadata()},
  )
