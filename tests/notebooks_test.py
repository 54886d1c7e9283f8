"""The notebooks for TPUs run on a CPU, with a tiny model in few steps."""

import json
import os
import pathlib
import sys

import nbclient
import pytest

from tests import notebooks

ROOT = pathlib.Path(__file__).resolve().parents[1]
SMALL = (
  *("model.name=tiny", "model.weights=random:0", "model.lora.rank=4"),
  "model.compute_dtype=float32",
  *("data.prompt_buckets=(512,)", "data.prompts_per_step=4"),
  *("rollout.prompts_at_a_time=4", "rollout.max_new_tokens=8"),
  *("train.microbatch_bundles=2", "train.num_steps=2"),
  *("eval.every_steps=1", "eval.num_problems=8", "eval.batch_size=8"),
)
SMOKE = (
  " --config.train.num_steps=2 --config.eval.every_steps=2"
  " --config.eval.num_problems=16"
)


@pytest.mark.parametrize("name", notebooks.NAMES)
def test_a_notebook_has_no_outputs_and_its_cells_have_names(name):
  cells = notebooks.read(name).cells
  assert not any(cell.get("outputs") for cell in cells)
  tags = [tag for cell in cells for tag in cell.metadata.get("tags", ())]
  assert sorted(tags) == ["download", "install", "parameters", "smoke"]
  sources = [
    {cell.id: cell.source for cell in notebooks.read(each).cells}
    for each in notebooks.NAMES
  ]
  for cell in ("run-install", "run-smoke", "draw-curves"):
    assert len({source[cell] for source in sources}) == 1


@pytest.mark.nightly
@pytest.mark.e2e
@pytest.mark.parametrize(
  ("name", "devices", "mesh"),
  [("kaggle_tpu", 4, "mesh.tensor=2"), ("colab_tpu", 1, "mesh.tensor=1")],
)
def test_a_notebook_trains_shows_asks_and_exports(
  name, devices, mesh, tmp_path, compiled
):
  """All cells but those that fetch packages, weights and data.

  The smoke run, whose cell is the same, once and on one device.
  """
  notebook = notebooks.read(name)
  rows = [
    {"question": f"{i} + 1?", "answer": f"So: #### {i + 1}"} for i in range(99)
  ]
  source = tmp_path / "sums.jsonl"
  source.write_text("".join(json.dumps(row) + "\n" for row in rows))
  python = tmp_path / "python"
  flags = f"--xla_force_host_platform_device_count={devices}"
  python.write_text(
    f'#!/bin/sh\nXLA_FLAGS="$XLA_FLAGS {flags}" exec {sys.executable} "$@"\n'
  )
  python.chmod(0o755)
  is_first = name == next(iter(notebooks.NAMES))
  settings = " ".join(f"--config.{setting}" for setting in (*SMALL, mesh))
  for cell in notebook.cells:
    tags = cell.metadata.get("tags", ())
    if "parameters" in tags:
      cell.source = "import os"
    elif "install" in tags or "download" in tags:
      cell.source = ""
    elif "smoke" in tags:
      cell.source = cell.source.rstrip() + SMOKE if is_first else ""
  environment = os.environ | {
    "CHECKOUT": str(ROOT),
    "GRPO_TPU_VENV": sys.prefix,
    "JAX_COMPILATION_CACHE_DIR": compiled,
    "JAX_PLATFORMS": "cpu",
    "PYTHON": str(python),
    "SETTINGS": settings,
    "SOURCE": str(source),
    "WEIGHTS": "none",
    "WORK": str(tmp_path),
    "XLA_FLAGS": os.environ.get("XLA_FLAGS", "").replace(
      "--xla_force_host_platform_device_count=8", ""
    ),
  }
  nbclient.NotebookClient(notebook, timeout=1800).execute(env=environment)
  outputs = {cell.id: str(cell.get("outputs", "")) for cell in notebook.cells}
  assert (tmp_path / "smoke" / "smoke.json").exists() == is_first
  assert "image/png" in outputs["draw-curves"]
  assert list((tmp_path / "run" / "export").glob("*.safetensors"))
