"""Eight virtual CPU devices for every test, and where the fixtures are."""

import os
import pathlib
import subprocess

import pytest

# Before any backend starts, and for the processes that tests start. Most of
# the time goes into compiling, of which the last two flags leave half.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  "--xla_force_host_platform_device_count=8"
  " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# Programs started by tests keep what they compile where tests tell them to.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


# Folders of tests that start whole programs.
_LONGEST = ("multihost", "e2e")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Starts the longest files first, so that no worker waits for one."""
  items.sort(key=lambda item: item.path.parent.name not in _LONGEST)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> str:
  """Where programs that tests start keep what they compile for each other.

  A developer's own cache, kept from one run of the tests to the next; or one
  for this run, of all its workers.
  """
  folder = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    folder = folder.parent
  return os.environ["JAX_COMPILATION_CACHE_DIR"] or str(folder / "compiled")


@pytest.fixture(scope="session")
def fixtures() -> pathlib.Path:
  """The folder of shared fixtures: `$GRPO_TPU_FIXTURES`, or beside the repo."""
  root = pathlib.Path(__file__).resolve().parents[1]
  folder = pathlib.Path(
    os.environ.get("GRPO_TPU_FIXTURES", root.parent / "shared" / "fixtures")
  )
  if not folder.is_dir():
    pytest.skip(f"no fixtures folder at {folder}; set GRPO_TPU_FIXTURES")
  return folder


@pytest.fixture(scope="session")
def peers_python() -> str:
  """The Python with torch: `$GRPO_TPU_PEERS_PYTHON`, or `.venv-peers`."""
  root = pathlib.Path(__file__).resolve().parents[1]
  python = os.environ.get(
    "GRPO_TPU_PEERS_PYTHON", str(root / ".venv-peers" / "bin" / "python")
  )
  if not pathlib.Path(python).is_file():
    pytest.skip(f"no {python}; run benchmarks/setup_peers.sh")
  code = (
    "from importlib.util import find_spec\n"
    "wanted = 'torch', 'transformers', 'peft', 'gguf'\n"
    "print(*(name for name in wanted if not find_spec(name)))"
  )
  ran = subprocess.run([python, "-c", code], capture_output=True, text=True)
  if ran.returncode or ran.stdout.strip():
    lacks = ran.stdout.strip() or ran.stderr
    pytest.skip(f"{python} lacks {lacks}; run benchmarks/setup_peers.sh")
  return python


@pytest.fixture
def bucket(tmp_path_factory):
  """An empty fake bucket; programs find it by `bucket.environment()`."""
  from tests.gcs import fake

  with fake.Server(tmp_path_factory.mktemp("certificates")) as server:
    yield server


@pytest.fixture
def bucket_here(bucket, monkeypatch):
  """The fake bucket, for the test's own process."""
  from data_pipelines.storage import objects

  for name, value in bucket.environment().items():
    monkeypatch.setenv(name, value)
  objects.client.cache_clear()  # Of an earlier test's bucket.
  return bucket
