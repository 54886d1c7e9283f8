"""Compiled programs may be kept in a bucket, which can stop no run."""

import jax
import pytest

from data_pipelines import validation
from data_pipelines.storage import objects
from grpo_tpu.distributed import compile_cache


@pytest.fixture
def folder(bucket_here, monkeypatch):
  """Enables the cache in a folder; returns the one that JAX then uses."""
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  before = jax.config.jax_compilation_cache_dir

  def enable(folder):
    compile_cache.enable_persistent_cache(folder)
    return jax.config.jax_compilation_cache_dir

  yield enable
  jax.config.update("jax_compilation_cache_dir", before)


def test_jax_is_given_the_bucket_and_no_folder_of_this_name(folder):
  assert folder("gs://bucket//compiled/") == "gs://bucket/compiled"


@pytest.mark.parametrize("name", ["no-such-bucket", "forbidden-bucket"])
def test_a_bucket_that_cannot_be_used_is_named_at_the_start(folder, name):
  """JAX would wait for it, for many minutes."""
  with pytest.raises(validation.SettingError, match="compilation_cache_dir"):
    folder(f"gs://{name}/compiled")


def test_a_bucket_that_does_not_answer_costs_the_cache_alone(
  folder, bucket_here, monkeypatch, caplog
):
  monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.1)
  before = jax.config.jax_compilation_cache_dir
  bucket_here.store.set_faults(busy=1.0)
  assert folder("gs://bucket/compiled") == before
  assert "No compilation cache" in caplog.text
