"""The layout of TensorBoard's Custom Scalars shows every metric."""

import re

import pytest

from grpo_tpu.observability import dashboard, registry

CHARTS = [
  chart for charts in dashboard.sections().values() for chart in charts.items()
]


def example(name: str) -> str:
  return name.replace("{slice}", "free-form.2").replace("{k}", "8")


def test_the_sections_are_the_questions_about_a_run():
  assert list(dashboard.sections()) == [
    "Learning",
    "Reward health",
    "Rollout",
    "Stability",
    "Performance",
    "Goodput",
  ]


@pytest.mark.parametrize("metric", registry.metrics(), ids=lambda m: m.name)
def test_every_metric_is_on_a_chart(metric):
  assert [
    title
    for title, metrics in CHARTS
    for pattern in dashboard.patterns(metrics)
    if re.match(pattern, example(metric.name))
  ]


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart[0])
def test_a_chart_shows_its_metrics_and_no_other(chart):
  """`rollout/reward` must not bring `rollout/reward_std` along."""
  _, metrics = chart
  names = {metric.name for metric in metrics}
  wanted = {
    re.escape(name).replace(r"\{slice\}", ".+").replace(r"\{k\}", ".+")
    for name in names
  }
  shown = {
    name
    for name in map(example, (m.name for m in registry.metrics()))
    if any(re.match(p, name) for p in dashboard.patterns(metrics))
  }
  assert {example(name) for name in names} <= shown
  assert all(any(re.fullmatch(w, name) for w in wanted) for name in shown)


def test_no_two_charts_have_the_same_title():
  titles = [title for title, _ in CHARTS]
  assert len(set(titles)) == len(titles)


def test_the_first_chart_is_the_eval_accuracy_alone():
  charts = dashboard.charts_of(
    ["train/loss", "eval/accuracy", "rollout/accuracy"]
  )
  first = next(iter(charts["Learning"].values()))
  assert dashboard.patterns(first) == ["^eval/accuracy$"]


@pytest.mark.parametrize("metric", registry.metrics(), ids=lambda m: m.name)
def test_no_chart_is_empty_and_none_is_missing(metric):
  name = example(metric.name)
  found = [x for charts in dashboard.charts_of([name]).values() for x in charts]
  assert found == [metric.chart]


def test_a_name_of_another_version_is_on_no_chart():
  assert dashboard.charts_of(["train/no_such_metric"]) == {}


def test_tensorboard_reads_the_layout():
  from tensorboard.plugins.custom_scalar import layout_pb2

  calls = []

  class Events:
    def write_summaries(self, *arguments):
      calls.append(arguments)

  dashboard.write(Events(), 7, dashboard.sections())
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
    section: [
      (title, dashboard.patterns(metrics)) for title, metrics in charts.items()
    ]
    for section, charts in dashboard.sections().items()
  }
