"""Adds to the site what lives outside docs/, and makes a page of the notebook.

MkDocs reads the folder docs/ alone, and its links must stay inside. README,
CONTRIBUTING and CHANGELOG stand at the root of the checkout, where a code host
shows them. This hook gives them a page each, makes a page of every notebook,
copies the other files that pages link to, and turns every link into one of the
site. The documents themselves keep the links that a code host follows.
"""

import json
import os
import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[1]
ROOT_PAGES = {
  "README.md": "index.md",
  "CONTRIBUTING.md": "contributing.md",
  "CHANGELOG.md": "changelog.md",
}
_LINK = re.compile(r"(?<=\]\()([^)\s#]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the root pages, the notebooks and the source files with a link."""
  for source, target in ROOT_PAGES.items():
    text = (ROOT / source).read_text(encoding="utf-8")
    files.append(File.generated(config, target, content=text))
  for notebook in sorted((ROOT / "docs").rglob("*.ipynb")):
    text = notebook_markdown(notebook)
    files.append(
      File.generated(
        config, site_path(str(notebook.relative_to(ROOT))), content=text
      )
    )
  pages = [ROOT / name for name in ROOT_PAGES]
  pages += sorted((ROOT / "docs").rglob("*.md"))
  for page in pages:
    folder = page.parent.relative_to(ROOT).as_posix()
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
      target = posixpath.normpath(posixpath.join(folder, link))
      path, is_copied = site_path(target), target.startswith("docs/")
      if (ROOT / target).is_file() and not is_copied:
        if files.get_file_from_path(path) is None:
          source = str(ROOT / target)
          files.append(File.generated(config, path, abs_src_path=source))
  return files


def on_page_markdown(
  markdown: str, page: Page, config: MkDocsConfig, files: Files
) -> str:
  """Turns links between files of the checkout into links of the site."""
  del config, files
  here = page.file.src_uri
  folder = posixpath.dirname(checkout_path(here))

  def site_link(match: re.Match[str]) -> str:
    target = posixpath.normpath(posixpath.join(folder, match[0]))
    if not (ROOT / target).is_file():
      return match[0]  # Of the network, or MkDocs reports it.
    return os.path.relpath(site_path(target), posixpath.dirname(here) or ".")

  return _LINK.sub(site_link, markdown)


def site_path(path: str) -> str:
  """The path within the site of a file of the checkout."""
  if path in ROOT_PAGES:
    return ROOT_PAGES[path]
  if path.startswith("docs/"):
    return re.sub(r"\.ipynb$", ".md", path.removeprefix("docs/"))
  return f"source/{path}"


def checkout_path(path: str) -> str:
  """The path within the checkout of a page of the site."""
  sources = {target: source for source, target in ROOT_PAGES.items()}
  return sources.get(path, f"docs/{path}")


def notebook_markdown(path: pathlib.Path) -> str:
  """A notebook's cells as Markdown: its prose, and its code in fences."""
  cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
  blocks = []
  for cell in cells:
    text = "".join(cell["source"]).strip()
    is_code = cell["cell_type"] == "code"
    blocks.append(f"```python\n{text}\n```" if is_code else text)
  return "\n\n".join(blocks) + "\n"
