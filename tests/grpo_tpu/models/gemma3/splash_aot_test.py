"""The kernel inside the network, compiled for described chips."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[4]
# No TPU, no metadata server to ask, no harm in others that load it too.
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@pytest.mark.aot
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed; it comes with the extra tpu",
)
def test_the_gradient_of_the_network_compiles_with_the_kernel_for_a_tpu():
  """Prompts and completions, local and global: four forward kernels.

  The backward pass recomputes the forward pass, and has two kernels for each.
  """
  script = pathlib.Path(__file__).with_name("splash_aot.py")
  environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": ""}
  python_path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
  ran = subprocess.run(
    [sys.executable, script],
    capture_output=True,
    text=True,
    env=environment | {"PYTHONPATH": python_path},
    timeout=500,
  )
  assert ran.returncode == 0, ran.stderr[-4000:]
  kernels = json.loads(ran.stdout.splitlines()[-1])
  assert kernels == {"lowered": 16, "compiled": 16}
