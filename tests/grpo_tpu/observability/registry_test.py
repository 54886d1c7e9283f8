"""Every metric is declared once, with all its fields, and is on one page."""

import pathlib
import re

import pytest

from configs import base
from grpo_tpu.observability import registry

ROOT = pathlib.Path(__file__).resolve().parents[3]


def settings(config, prefix=""):
  """Yields the dotted names of settings and sections."""
  for name, value in config.items():
    yield prefix + name
    if hasattr(value, "items"):
      yield from settings(value, f"{prefix}{name}.")


def test_each_metric_is_declared_once_with_all_fields():
  names = [metric.name for metric in registry.metrics()]
  assert len(set(names)) == len(names)
  groups = "train|rollout|reward|eval|perf|data|checkpoint"
  for metric in registry.metrics():
    word = r"([a-z0-9_]+({k})?(/{slice})?|(reward/)?{slice}[_/][a-z_]+)"
    assert re.fullmatch(f"({groups})/{word}", metric.name)
    assert metric.unit and metric.meaning and metric.advice


def test_the_page_is_generated_from_the_table():
  """`python -m grpo_tpu.observability.registry > docs/metrics.md` writes it."""
  page = (ROOT / "docs" / "metrics.md").read_text()
  assert page == registry.page()


def test_the_page_has_every_metric_in_a_row_of_four_cells():
  rows = re.findall(r"^\| `(.*?)` \| (.*) \|$", registry.page(), re.M)
  assert [name for name, _ in rows] == [m.name for m in registry.metrics()]
  assert all(re.split(r"(?<!\\) \| ", rest)[2] for _, rest in rows)


@pytest.mark.parametrize(
  "metric", registry.metrics(), ids=lambda metric: metric.name
)
def test_everything_that_an_advice_names_exists(metric):
  """The settings, metrics and pages of an advice exist."""
  names = {m.name for m in registry.metrics()}
  known = set(settings(base.get_config()))
  for quoted in re.findall(r"`([^`]+)`", metric.advice):
    word = quoted.split("=")[0]
    if "/" in word:
      assert word in names
    elif "." in word or word == "compilation_cache_dir":
      assert word in known
  for page in re.findall(r"\]\(([^)]+)\)", metric.advice):
    assert (ROOT / "docs" / page.split("#")[0]).is_file()


def test_the_index_of_a_name_is_the_index_of_its_row():
  for index, metric in enumerate(registry.metrics()):
    if "{" not in metric.name:
      assert registry.row_index(metric.name) == index
  sliced = registry.row_index("eval/accuracy/free_form")
  assert registry.metrics()[sliced].name == "eval/accuracy/{slice}"
  sampled = registry.row_index("eval/pass_at_16/geo-1")
  assert registry.metrics()[sampled].name == "eval/pass_at_{k}/{slice}"
  with pytest.raises(ValueError, match="'eval/pass_at_k' is not declared"):
    registry.row_index("eval/pass_at_k")
  with pytest.raises(ValueError, match="mean 'train/loss'.*metrics.toml"):
    registry.row_index("train/los")
