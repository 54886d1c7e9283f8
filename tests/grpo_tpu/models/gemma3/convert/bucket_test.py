"""Weights in a bucket: equal to local ones, read in parts, refused alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import weights
from grpo_tpu.models.gemma3.convert import blocks, huggingface, remote
from tests.grpo_tpu.models.gemma3 import one_device
from tests.grpo_tpu.models.gemma3.convert import (
  gguf_test,
  huggingface_test,
  orbax_gemma_test,
)

BUCKET = "some-weights"
pytestmark = pytest.mark.usefixtures("quick_compile")
THERE = f"gs://{BUCKET}/a/tiny"


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
  """A checkpoint in bfloat16 of several files."""
  folder = tmp_path_factory.mktemp("huggingface")
  params = weights.random_params(tiny.config, 0, np.dtype(jnp.bfloat16))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(huggingface, "_SHARD_BYTES", 10_000)
    huggingface.save(tiny.config, params, folder, dtype=jnp.bfloat16)
  return folder


@pytest.fixture
def put(bucket_here):
  """Puts a file, or the files below a folder, at a place in the bucket."""

  def put(path, at="a/tiny"):
    for file in [path] if path.is_file() else path.rglob("*"):
      name = f"{at}/{file.relative_to(path).as_posix()}".removesuffix("/.")
      if file.is_file():
        bucket_here.store.put(BUCKET, name, file.read_bytes(), "", {})

  return put


@pytest.fixture
def asked(monkeypatch):
  """The parts that are read of files in a bucket: name, start and stop."""
  found, read = [], remote.File.start_read

  def start_read(file, start, stop):
    found.append((file._name, start, stop))
    return read(file, start, stop)

  monkeypatch.setattr(remote.File, "start_read", start_read)
  return found


def test_every_leaf_is_that_of_the_local_folder(
  tiny, whole, put, asked, monkeypatch
):
  """On eight devices, in blocks of a few rows; no byte is read twice."""
  monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1000)
  monkeypatch.setattr(blocks, "_AHEAD_BYTES", 5000)
  put(whole)
  mesh = sharding.make_mesh(replica=2, fsdp=2, tensor=2)
  wanted = huggingface_test.placed(tiny.config, mesh, jnp.float32)
  local = weights.open_files("hf", tiny.config, whole).load(wanted)
  opened = weights.open_files("hf", tiny.config, THERE)
  headers, asked[:] = asked.copy(), []
  got = opened.load(wanted)
  for x, w in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert x.sharding == w.sharding
  huggingface_test.assert_equal(got, local)
  num_bytes = sum(stop - start for _, start, stop in asked)
  assert num_bytes == 2 * sum(x.size for x in jax.tree.leaves(wanted))
  assert len(set(asked)) == len(asked) > num_bytes / 1000
  assert len(headers) == 2 * len(list(whole.glob("*.safetensors")))


def test_a_host_reads_ahead_but_only_so_far(tiny, whole, put, monkeypatch):
  """Blocks that no device has used are counted when the first one is used."""
  monkeypatch.setattr(blocks, "_BLOCK_BYTES", 1000)
  monkeypatch.setattr(blocks, "_AHEAD_BYTES", 5000)
  put(whole)
  opened = weights.open_files("hf", tiny.config, THERE)
  started, used, most = [], [], []
  start_read = huggingface.Tensor.start_read

  def counted(tensor, start, stop):
    wait = start_read(tensor, start, stop)
    started.append((stop - start) * tensor.row_bytes)

    def finish():
      most.append(sum(started) - sum(used))
      used.append(started[len(used)])
      return wait()

    return finish

  monkeypatch.setattr(huggingface.Tensor, "start_read", counted)
  opened.load(
    one_device.on_one_device(weights.abstract_params(tiny.config, jnp.bfloat16))
  )
  assert max(started) < 4000 < max(most) <= 5000


@pytest.mark.parametrize(
  "damage",
  [
    lambda x: x[:-1],
    lambda x: x + b"\0",
    lambda x: x[:5],
    lambda x: b"",
    lambda x: (2**40).to_bytes(8, "little") + x[8:],
    lambda x: x[:8] + b"[" + x[9:],
  ],
)
def test_a_damaged_file_is_refused_as_a_local_one(
  tiny, whole, put, tmp_path, damage
):
  for file in whole.iterdir():
    content = file.read_bytes()
    content = damage(content) if "00002-of" in file.name else content
    (tmp_path / file.name).write_bytes(content)
  put(tmp_path)
  errors = []
  for folder in (str(tmp_path), THERE):
    with pytest.raises(ValueError, match="1 are not") as error:
      weights.open_files("hf", tiny.config, folder)
    errors.append(str(error.value).replace(folder, "DIR"))
  assert errors[0] == errors[1]


def test_a_file_that_is_replaced_meanwhile_is_an_error(
  tiny, whole, put, bucket_here
):
  put(whole)
  opened = weights.open_files("hf", tiny.config, THERE)
  abstract = weights.abstract_params(tiny.config, jnp.float32)
  for file in whole.glob("*.safetensors"):
    bucket_here.store.put(
      BUCKET, f"a/tiny/{file.name}", file.read_bytes(), "", {}
    )
  with pytest.raises(RuntimeError, match="has changed while it was read"):
    opened.load(one_device.on_one_device(abstract))


def test_a_gguf_file_is_that_of_the_disk(put, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  config = gguf_test.CONFIG
  params = weights.random_params(config, 0, np.dtype(np.float32))
  tensors = gguf_test.tensors_of(config, params)
  path = tmp_path / "a.gguf"
  gguf_test.write(path, gguf_test.metadata(config), tensors)
  put(path)
  gguf_test.assert_trees_equal(gguf_test.load(THERE), gguf_test.load(path))


@pytest.mark.nightly  # It imports TensorFlow.
def test_a_checkpoint_of_the_library_is_that_of_the_disk(put, tmp_path):
  config = orbax_gemma_test.CONFIG
  params = weights.random_params(config, 0, np.dtype(np.float32))
  path = tmp_path / "gemma"
  orbax_gemma_test.save(path, orbax_gemma_test.nested(config, params))
  put(path)
  loaded = orbax_gemma_test.load(THERE)
  orbax_gemma_test.assert_trees_equal(loaded, params)


def test_a_folder_in_a_bucket_is_that_of_the_disk(
  tiny, tmp_path, bucket_here, monkeypatch
):
  """Also after an attempt that was killed; and it is written once."""
  monkeypatch.setattr(huggingface, "_SHARD_BYTES", 20_000)
  params = weights.random_params(tiny.config, 0, np.dtype(np.float32))
  files = {"README.md": b"A model."}
  huggingface.save(tiny.config, params, tmp_path, files=files)
  objects = bucket_here.store.objects
  first = min(x.name for x in tmp_path.glob("*.safetensors"))
  bucket_here.store.put(BUCKET, f"a/tiny/{first}", b"", "", {})
  huggingface.save(tiny.config, params, THERE, files=files)
  found = {name: bytes(blob.data) for (_, name), blob in objects.items()}
  assert found == {
    f"a/tiny/{x.name}": x.read_bytes() for x in tmp_path.iterdir()
  }
  written = sorted(objects, key=lambda x: objects[x].generation)
  assert written[-1][1] == "a/tiny/config.json"
  with pytest.raises(ValueError, match="must not hold a checkpoint yet"):
    huggingface.check_no_checkpoint(THERE)
