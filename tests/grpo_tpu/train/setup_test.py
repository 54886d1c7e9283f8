"""What fails while a run is restored is no fault of its settings."""

import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import validation
from grpo_tpu.checkpoint import reader
from grpo_tpu.distributed import collectives, initialize, sharding
from grpo_tpu.observability import exit_report
from grpo_tpu.train import setup
from tests.grpo_tpu.checkpoint.checkpointing import opened


@pytest.fixture
def mesh():
  return sharding.make_mesh(replica=1, fsdp=8, tensor=1)


@pytest.fixture
def workdir(tmp_path, mesh):
  """Holds a checkpoint of step 1."""
  with opened(tmp_path / "checkpoints") as checkpoints:
    w = jax.device_put(jnp.arange(8.0), sharding.batch_sharding(mesh))
    checkpoints.save(1, {"params": {"w": w}}, {"data": "a"}, force=True)
  return tmp_path


def exit_code(workdir: pathlib.Path, mesh, words: str, *, length=8) -> int:
  """The code with which a run that cannot be restored ends."""
  placement = sharding.batch_sharding(mesh)
  leaf = jax.ShapeDtypeStruct((length,), np.float32, sharding=placement)
  trainer = types.SimpleNamespace(
    mesh=mesh,
    learner=types.SimpleNamespace(
      abstract_state=lambda: {"params": {"w": leaf}}
    ),
  )
  record = types.SimpleNamespace(check_data=lambda meta: None)
  with opened(workdir / "checkpoints") as checkpoints:
    with pytest.raises(Exception, match=words) as caught:
      # The run is refused by whatever surrounds the restore, too.
      with validation.user_errors():
        setup._restore_or_init(trainer, checkpoints, record)
  # The code with which the process would end.
  codes = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(initialize, "shutdown", codes.append)
    exit_report.ExitReport().exit_with(caught.value)
  return codes[0]


def test_data_that_vanish_after_they_were_verified_end_a_run_with_1(
  workdir, mesh, monkeypatch
):
  def verify_and_remove(path):
    for file in pathlib.Path(path).glob("state/**/manifest.ocdbt"):
      file.unlink()
    return ""

  monkeypatch.setattr(reader, "find_damage", verify_and_remove)
  assert exit_code(workdir, mesh, "NOT_FOUND") == 1


def test_an_error_of_the_storage_library_ends_a_run_with_1(
  workdir, mesh, monkeypatch
):
  def fail(*_, **__):
    raise ValueError("NOT_FOUND: Error opening zarr driver")

  monkeypatch.setattr(reader.ocp.PyTreeCheckpointHandler, "restore", fail)
  assert exit_code(workdir, mesh, "NOT_FOUND") == 1


def test_a_leaf_of_another_shape_ends_a_run_with_64(workdir, mesh):
  assert exit_code(workdir, mesh, "w: saved", length=16) == 64


def test_a_lost_peer_ends_a_run_with_1(monkeypatch):
  def fail(*_):
    raise ValueError("UNKNOWN: Gloo AllGather failed")

  monkeypatch.setattr(collectives, "num_processes", lambda: 2)
  monkeypatch.setattr(collectives.multihost_utils, "process_allgather", fail)
  with pytest.raises(RuntimeError), validation.user_errors():
    collectives.gather_bytes(b"")
