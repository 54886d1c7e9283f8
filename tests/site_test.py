"""The site builds without a warning, fetches nothing, and has what it must."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
_SCRIPT = "launch/site.sh"


def build(checkout: pathlib.Path, site: pathlib.Path) -> tuple[int, str]:
  """Runs the script in a checkout; its exit code and its output."""
  ran = subprocess.run(
    ["bash", _SCRIPT, f"--site-dir={site}"],
    cwd=checkout,
    env=os.environ | {"GRPO_TPU_VENV": sys.prefix},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  return ran.returncode, ran.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("site")
  code, output = build(ROOT, folder)
  assert code == 0 and "WARNING" not in output, output
  return folder


def test_every_document_has_a_page(site):
  pages = {path.relative_to(ROOT / "docs") for path in documents()}
  names = {str(path.with_suffix(".html")) for path in pages}
  names = {re.sub(r"README\.html$", "index.html", name) for name in names}
  names |= {"index.html", "contributing.html", "changelog.html"}
  assert [name for name in sorted(names) if not (site / name).is_file()] == []


def documents() -> list[pathlib.Path]:
  docs = ROOT / "docs"
  return sorted([*docs.rglob("*.md"), *docs.rglob("*.ipynb")])


def test_every_document_is_in_the_menu():
  menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
  paths = [
    str(path.relative_to(ROOT / "docs").with_suffix(".md"))
    for path in documents()
  ]
  assert [path for path in paths if f" {path}\n" not in menu] == []


def test_pages_load_nothing_from_the_network(site):
  """No script, style sheet, font or picture; links for readers may leave."""
  loads = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(?:https?:)?//[^>]*>"
    r"|<link\b[^>]*\bhref=\"?(?:https?:)?//[^>]*>"
  )
  found = {
    f"{page.relative_to(site)}: {match[0]}"
    for page in site.rglob("*.html")
    for match in loads.finditer(page.read_text(encoding="utf-8"))
  }
  for sheet in site.rglob("*.css"):
    text = sheet.read_text(encoding="utf-8")
    found |= set(re.findall(r"(?:url\(|@import )[\"']?https?:[^)]*", text))
  assert found == set()


def test_links_between_pages_lead_to_files_of_the_site(site):
  """README's links too, which start at another folder in the checkout."""
  dead = []
  for page in site.rglob("*.html"):
    if page.name == "404.html":
      continue  # Its links are absolute: it is served for any path.
    for link in re.findall(r'href="([^"#?]+)', page.read_text()):
      if not re.match(r"[a-z]+:", link):
        if not (page.parent / link).exists():
          dead.append(f"{page.relative_to(site)}: {link}")
  assert dead == []


def test_the_api_pages_show_the_docstrings(site):
  for page, words in (
    ("objective", ("group_advantages", "policy_loss", "beta")),
    ("data", ("verify", "Problem")),
  ):
    text = (site / "api" / f"{page}.html").read_text()
    assert [word for word in words if word not in text] == []


def test_the_search_finds_a_function_and_a_heading(site):
  index = json.loads((site / "search" / "search_index.json").read_text())
  titles = " ".join(entry["title"] for entry in index["docs"])
  assert "group_advantages" in titles and "Quickstart" in titles


def test_a_dead_link_ends_the_build(tmp_path):
  """The check itself."""
  checkout = tmp_path / "checkout"
  for name in ("docs", "launch"):
    shutil.copytree(ROOT / name, checkout / name)
  for path in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml", ROOT / "LICENSE"):
    shutil.copy(path, checkout)
  shutil.rmtree(checkout / "docs" / "api")  # They take the packages.
  with open(checkout / "docs" / "weights.md", "a") as page:
    page.write("\n[nowhere](no-such-page.md)\n")
  code, output = build(checkout, tmp_path / "site")
  assert code != 0
  assert "no-such-page.md" in output
