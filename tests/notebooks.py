"""The notebooks for TPUs: their cells, and the commands in them."""

import pathlib
import re
import shlex

import nbformat

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "docs" / "notebooks"
NAMES = {"kaggle_tpu": "v5e:2x4", "colab_tpu": "v5e:1x1"}  # And their chips.


def read(name: str) -> nbformat.NotebookNode:
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def commands(name: str) -> list[list[str]]:
  """The flags of each call of the program, and the slice it is for."""
  found = []
  for cell in read(name).cells:
    text = cell.source.replace("\\\n", " ").replace("$SETTINGS", "")
    text = re.sub(r"\$([A-Z]+)", r"/\1", text)
    lines = [
      shlex.split(line) for line in text.splitlines() if "-m grpo" in line
    ]
    found += [line[line.index("grpo_tpu") + 1 :] for line in lines]
  return [[*words, f"--topology={NAMES[name]}"] for words in found]
