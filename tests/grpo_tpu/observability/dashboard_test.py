"""The layout of TensorBoard's Custom Scalars: no metric is left out of it."""

import re

import pytest

from grpo_tpu.observability import dashboard, registry

CHARTS = [
  (section, chart)
  for section, charts in dashboard.SECTIONS.items()
  for chart in charts
]


def example(name: str) -> str:
  return name.replace("{slice}", "free-form.2")


def test_the_sections_are_the_questions_that_are_asked_of_a_run():
  assert list(dashboard.SECTIONS) == [
    "Learning",
    "Reward health",
    "Rollout",
    "Stability",
    "Performance",
    "Goodput",
  ]


@pytest.mark.parametrize("metric", registry.METRICS, ids=lambda m: m.name)
def test_every_metric_is_on_a_chart(metric):
  assert [
    chart.title
    for _, chart in CHARTS
    for pattern in dashboard.patterns(chart)
    if re.match(pattern, example(metric.name))
  ]


@pytest.mark.parametrize("pair", CHARTS, ids=lambda pair: pair[1].title)
def test_a_chart_shows_the_metrics_it_names_and_no_other(pair):
  """`rollout/reward` must not bring `rollout/reward_std` along."""
  _, chart = pair
  wanted = {re.escape(name).replace(r"\{slice\}", ".+") for name in chart.names}
  shown = {
    name
    for name in map(example, (m.name for m in registry.METRICS))
    if any(re.match(p, name) for p in dashboard.patterns(chart))
  }
  assert {example(name) for name in chart.names} <= shown
  assert all(any(re.fullmatch(w, name) for w in wanted) for name in shown)


def test_no_two_charts_of_a_section_have_one_title():
  for charts in dashboard.SECTIONS.values():
    titles = [chart.title for chart in charts]
    assert len(set(titles)) == len(titles)


def test_what_is_written_is_a_layout_that_tensorboard_reads():
  from tensorboard.plugins.custom_scalar import layout_pb2

  calls = []

  class Events:
    def write_summaries(self, *arguments):
      calls.append(arguments)

  dashboard.write(Events(), 7)
  ((step, values, metadata),) = calls
  assert step == 7
  assert list(values) == ["custom_scalars__config__"]
  kind = metadata["custom_scalars__config__"].plugin_data.plugin_name
  assert kind == "custom_scalars"
  layout = layout_pb2.Layout.FromString(values["custom_scalars__config__"])
  assert {
    category.title: [
      (chart.title, list(chart.multiline.tag)) for chart in category.chart
    ]
    for category in layout.category
  } == {
    section: [(chart.title, dashboard.patterns(chart)) for chart in charts]
    for section, charts in dashboard.SECTIONS.items()
  }
