"""The documents are right about links, settings, metrics, paths and rooms."""

import pathlib
import re

import pytest

from configs import base
from grpo_tpu.observability import registry
from tests import layering_test

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# GitHub's rule for the anchors of headings.
_NOT_IN_ANCHOR = re.compile(r"[^\w\- ]")


def name_of(page: pathlib.Path) -> str:
  return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
  text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
  return re.sub(r"`[^`\n]*`", "", text)


def anchors(page: pathlib.Path) -> set[str]:
  text = re.sub(
    r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE
  )
  found: set[str] = set()
  for heading in re.findall(r"^#+ +(.+?)\s*$", text, flags=re.MULTILINE):
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    anchor = _NOT_IN_ANCHOR.sub("", words.lower()).replace(" ", "-")
    number = sum(
      1 for x in found if re.fullmatch(f"{re.escape(anchor)}(-\\d+)?", x)
    )
    found.add(f"{anchor}-{number}" if number else anchor)
  return found


def dead_links(page: pathlib.Path, text: str) -> list[str]:
  dead = []
  for link in _LINK.findall(without_code(text)):
    if re.match(r"[a-z]+:", link):
      continue  # An address on the network, which tests do not ask.
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    is_inside = target.is_relative_to(ROOT)
    is_there = is_inside and target.exists()
    if not is_there or (anchor and anchor not in anchors(target)):
      dead.append(link)
  return dead


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page):
  assert dead_links(page, page.read_text()) == []


def test_a_link_that_leads_nowhere_is_found():
  """The check itself."""
  page = ROOT / "docs" / "plan.md"
  text = (
    "[a](no.md) [b](plan.md#no) [c](#planning-a-slice) [d](../README.md)"
    " [e](../../x) `[f](code.md)` [g](https://example.com/)"
  )
  assert dead_links(page, text) == ["no.md", "plan.md#no", "../../x"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_page_is_reached_from_the_readme(page):
  reached, waiting = set(), [ROOT / "README.md"]
  while waiting:
    here = waiting.pop()
    reached.add(here)
    for link in _LINK.findall(without_code(here.read_text())):
      target = (here.parent / link.partition("#")[0]).resolve()
      pages = target.glob("*.md") if target.is_dir() else [target]
      waiting += [
        each for each in pages if each in PAGES and each not in reached
      ]
  assert page in reached


def leaves(values, prefix=""):
  """Dotted names of settings and sections."""
  for name, value in values.items():
    yield prefix + name
    if hasattr(value, "items"):
      yield from leaves(value, f"{prefix}{name}.")


SETTINGS = set(leaves(base.get_config()))
SECTIONS = {name.split(".")[0] for name in SETTINGS if "." in name}
# Names of files that look like settings, as `data.py` does.
_FILES = re.compile(r"\.(py|json|jsonl|md|sh|txt|yaml|model|gz)$")


def settings_named(text: str) -> set[str]:
  """Names of settings in a text: after --config., or in quotes as code."""
  flags = re.findall(r"--config\.([a-z_0-9.]+[a-z_0-9])", text)
  quoted = re.findall(r"`([a-z_]+\.[a-z_0-9.]+)(?:=[^`]*)?`", text)
  return {*flags} | {
    name
    for name in quoted
    if name.split(".")[0] in SECTIONS and not _FILES.search(name)
  }


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_setting_that_a_page_names_exists(page):
  assert settings_named(page.read_text()) - SETTINGS == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_metric_that_a_page_names_exists(page):
  prefixes = "train|rollout|reward|eval|data|perf|checkpoint"
  quoted = re.findall(rf"`((?:{prefixes})/[a-z_0-9/]+)`", page.read_text())
  folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
  assert [
    name
    for name in quoted
    if not any(re.fullmatch(x.pattern, name) for x in registry.metrics())
    and not name.endswith("/")
    and not (name.split("/")[0] in folders or (ROOT / name).exists())
  ] == []


def test_the_guide_has_the_rooms_and_floors_that_the_layers_have():
  text = (ROOT / "CONTRIBUTING.md").read_text()
  rows = re.findall(r"^\| (\d+) \| `([a-z_.]+)` \|", text, flags=re.MULTILINE)
  assert {room: int(floor) for floor, room in rows} == layering_test.FLOOR_OF


# Folders and files of ours, as the guides write them, in quotes as code.
_PATH = re.compile(
  r"`((?:grpo_tpu|data_pipelines|configs|launch|benchmarks|tests|docs)/[\w./]+)`"
)
_MADE_BY_THE_READER = "launch/tpu.env"
_MODULE = re.compile(r"python -m ((?:grpo_tpu|data_pipelines)[\w.]*)")


def module_exists(module: str) -> bool:
  path = ROOT / module.replace(".", "/")
  return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_and_module_that_a_page_names_exists(page):
  """Except the changelog, which names what is gone."""
  if page.name == "CHANGELOG.md":
    return
  text = page.read_text()
  paths = set(_PATH.findall(text)) - {_MADE_BY_THE_READER}
  assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
  assert [
    name for name in _MODULE.findall(text) if not module_exists(name)
  ] == []
