"""The program that the processes of processes_test run.

`python checkpoint_program.py COMMAND ...`, with `PROCESS`, `PROCESSES` and
`COORDINATOR` in the environment. Each prints its result as one line of JSON.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines import validation
from grpo_tpu.checkpoint import checkpointer, manifest, reader
from grpo_tpu.distributed import preflight
from tests.grpo_tpu.checkpoint import checkpointing


def values(seed):
  """The values of a state as NumPy arrays; they differ for every seed."""
  draw = np.random.default_rng(seed)
  return {
    "params": {
      "w": draw.normal(size=(16, 8)).astype(np.float32),
      "b": draw.normal(size=(8, 16)).astype(jnp.bfloat16),
    },
    "mu": draw.normal(size=(16, 8)).astype(np.float32),
    "key": np.array([seed, 7], np.uint32),
    "count": np.int32(seed),
  }


def digest(tree):
  """A hash of every bit of a tree of NumPy arrays."""
  whole = hashlib.sha256()
  for leaf in jax.tree.leaves(tree):
    whole.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
  return whole.hexdigest()


def put_on_mesh(mesh, tree):
  """The tree on the mesh; matrices are sharded, the rest is replicated."""

  def put(leaf):
    spec = PartitionSpec("fsdp", "tensor") if leaf.ndim > 1 else PartitionSpec()
    return jax.make_array_from_callback(
      leaf.shape, NamedSharding(mesh, spec), lambda index: leaf[index]
    )

  return jax.tree.map(put, tree)


def state_of(mesh, seed):
  state = put_on_mesh(mesh, values(seed))
  return state | {"key": jax.random.wrap_key_data(state["key"])}


def global_digest(state):
  """The digest of a state that is sharded over the processes."""
  state = state | {"key": jax.random.key_data(state["key"])}
  return digest(
    jax.tree.map(
      lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)),
      state,
    )
  )


def rows(seed):
  return {"ids": np.arange(48, dtype=np.int32).reshape(16, 3) * seed}


def relay(mesh, folder, step):
  """Resumes if possible, and saves the next step and half a step more."""
  result = restore_one(mesh, folder)
  step = int(step)
  by_rows = NamedSharding(mesh, PartitionSpec(("fsdp", "tensor")))
  arrays = {
    name: jax.make_array_from_callback(x.shape, by_rows, lambda i, x=x: x[i])
    for name, x in rows(step).items()
  }
  partial_step = reader.PartialStepData(1, arrays, {"half": step + 0.5})
  with checkpointing.opened(folder) as checkpoints:
    checkpoints.save(step, state_of(mesh, step), {"is": step})
    checkpoints.save(
      step, state_of(mesh, 100 + step), {"is": step}, partial_step=partial_step
    )
  return result


def start(mesh, folder):
  """Saves steps 1 and 2."""
  with checkpointing.opened(folder) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state_of(mesh, step), {"is": step})


def restore_one(mesh, folder):
  by_rows = NamedSharding(mesh, PartitionSpec(("fsdp", "tensor")))
  with checkpointing.opened(folder) as checkpoints:
    try:
      found = checkpoints.restore(
        state_of(mesh, 0), partial_step_sharding=by_rows
      )
    except checkpointer.CheckpointError as error:
      return {"error": str(error)}
    result = {"quarantined": checkpoints.quarantined}
  if found is None:
    return result | {"step": None}
  result |= {
    "step": found.step,
    "meta": found.meta,
    "digest": global_digest(found.state),
  }
  if found.partial_step is not None:
    arrays = jax.tree.map(
      lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)),
      found.partial_step.arrays,
    )
    result["partial_step"] = [
      found.partial_step.updates_done,
      digest(arrays),
      found.partial_step.record,
    ]
  return result


def restore(mesh, *folders):
  return [restore_one(mesh, folder) for folder in folders]


def borrow(mesh, *folders):
  """Reads the parameters of the newest good step, and of step 2.

  First, each process but the first one has a disk of its own.
  """
  preflight.check_workdir("common", folders[0], timeout_seconds=60)
  own = f"{folders[0]}/{jax.process_index() or ''}"
  try:
    preflight.check_workdir("own", own, timeout_seconds=2)
    results = [""]
  except validation.SettingError as refused:
    results = [str(refused)]
  for folder in folders:
    params = state_of(mesh, 0)["params"]
    newest = reader.newest_step(folder)
    reader.restore_params(folder, newest, params)
    try:
      reader.restore_params(folder, 2, params)
      error = ""
    except ValueError as caught:
      error = str(caught)
    results.append([newest, error])
  return results


def fail(mesh, folder, timeout):
  """Saves while the last process cannot write; the others train."""
  train = jax.jit(lambda x: (x @ x.T).sum())
  start = time.monotonic()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  times = []
  try:
    with checkpointing.opened(
      folder, max_failures=2, timeout_seconds=int(timeout)
    ) as checkpoints:
      checkpoints.save(1, state_of(mesh, 1), {})
      checkpoints.wait()
      if jax.process_index() == jax.process_count() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
      for step in range(2, 2000):
        started = time.monotonic()
        float(train(state_of(mesh, step)["params"]["w"]))
        checkpoints.save(step, state_of(mesh, step), {})
        times.append(time.monotonic() - started)
  except checkpointer.CheckpointError as error:
    resource.setrlimit(
      resource.RLIMIT_FSIZE, (soft, hard)
    )  # So that it can print.
    return {
      "error": str(error),
      "failures": checkpoints.failures,
      "seconds": time.monotonic() - start,
      "longest": max(times),
    }
  return {}


def hinder(mesh, folder, hindered):
  """Saves step 1, and more steps once the file exists, until an error."""
  start = time.monotonic()
  try:
    with checkpointing.opened(
      folder, max_failures=2, timeout_seconds=5
    ) as checkpoints:
      checkpoints.save(1, state_of(mesh, 1), {})
      checkpoints.wait()
      print("SAVED", flush=True)
      while not os.path.exists(hindered):
        time.sleep(0.01)
      start = time.monotonic()
      for step in range(2, 2000):
        checkpoints.save(step, state_of(mesh, step), {})
        time.sleep(0.01)
  except checkpointer.CheckpointError as error:
    return {"error": str(error), "seconds": time.monotonic() - start}
  return {}


def die(mesh, folder, moment, index):
  """Kills one process during the save of step 2."""
  is_victim = jax.process_index() == int(index)

  def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

  with checkpointing.opened(folder, timeout_seconds=60) as checkpoints:
    checkpoints.save(1, state_of(mesh, 1), {"is": 1})
    checkpoints.wait()
    if is_victim and moment == "manifest":
      manifest.write = kill
    checkpoints.save(2, state_of(mesh, 2), {"is": 2})
    if is_victim and moment == "save":
      kill()
    time.sleep(60)


def main():
  index, count = int(os.environ["PROCESS"]), int(os.environ["PROCESSES"])
  if count > 1:
    jax.distributed.initialize(
      os.environ["COORDINATOR"],
      num_processes=count,
      process_id=index,
      initialization_timeout=100,
      shutdown_timeout_seconds=20,
    )
  tensor = int(os.environ["TENSOR"])
  devices = np.array(jax.devices()).reshape(-1, tensor)
  command, *arguments = sys.argv[1:]
  result = globals()[command](Mesh(devices, ("fsdp", "tensor")), *arguments)
  print("RESULT", json.dumps(result), flush=True)


if __name__ == "__main__":
  main()
