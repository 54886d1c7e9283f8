"""A wheel holds the two packages, and works outside the checkout."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("data_pipelines", "grpo_tpu")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
  """A wheel of this checkout, kept in $WHEEL_DIR if it is set."""
  folder = tmp_path_factory.mktemp("wheel")
  # setuptools writes beside the sources, so it gets a copy of them.
  tree = folder / "tree"
  for package in PACKAGES:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / package, tree / package, ignore=ignore)
  shutil.copy(ROOT / "setup.py", tree)
  words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation"]
  target = (ROOT / os.environ.get("WHEEL_DIR", folder)).resolve()
  subprocess.run(
    [sys.executable, "-m", "pip", *words, f"--wheel-dir={target}", str(tree)],
    check=True,
  )
  (made,) = target.glob("grpo_tpu-*.whl")
  return made


def test_it_holds_the_packages_with_their_data_and_nothing_else(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
  tops = {name.split("/")[0] for name in names}
  assert {top for top in tops if not top.endswith(".dist-info")} == {*PACKAGES}
  sources = {
    path.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for path in (ROOT / package).rglob("*")
    if path.is_file() and path.suffix != ".pyc"
  }
  assert sources <= names


def test_it_runs_from_a_bare_environment(wheel, tmp_path):
  """With this environment's packages in the place of a download."""
  venv.create(tmp_path / "venv", with_pip=True)
  python = tmp_path / "venv" / "bin" / "python"
  install = ["-m", "pip", "install", "--quiet", "--no-deps", str(wheel)]
  subprocess.run([python, *install], check=True, cwd=tmp_path)
  (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
  (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

  script = tmp_path / "venv" / "bin" / "grpo_tpu"

  def run(*words: str | os.PathLike[str]) -> str:
    return subprocess.run(
      words, check=True, cwd=tmp_path, capture_output=True, text=True
    ).stdout

  code = (
    "import data_pipelines.prepare, grpo_tpu.main; print(grpo_tpu.__file__)"
  )
  assert pathlib.Path(run(python, "-c", code).strip()).is_relative_to(site)
  text = run(script, "--help")
  assert "--workdir" in text and text == run(python, "-m", "grpo_tpu", "--help")


@pytest.mark.e2e
def test_the_notebook_runs_from_it_and_the_model_learns_to_see(
  wheel, tmp_path, compiled
):
  """Every cell, in a folder of its own, on one device."""
  site = tmp_path / "site"
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(site)
  path = ROOT / "docs" / "notebooks" / "grpo_on_a_laptop.ipynb"
  notebook = nbformat.read(path, as_version=4)
  assert not any(cell.get("outputs") for cell in notebook.cells)
  notebook.cells.append(
    nbformat.v4.new_code_cell("print(grpo_tpu.__file__, dataset.__file__)")
  )
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": compiled,
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(site),
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace(
      "--xla_force_host_platform_device_count=8", ""
    ),
  }
  client = nbclient.NotebookClient(
    notebook, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}
  )
  client.execute(env=environment)
  output = "\n".join(
    str(part.get("text", ""))
    for cell in notebook.cells
    for part in cell.get("outputs", ())
  )
  assert output.count(str(site)) == 2
  # Guessing is right on 0.29 of the problems.
  shares = re.findall(r"images(?: removed)?: accuracy ([\d.]+) on 64", output)
  seeing, blind = map(float, shares)
  assert seeing > 0.8 and blind < 0.5
