"""Files tell which model they hold, and a fingerprint what is in them."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest

from configs import base
from data_pipelines.storage import objects
from data_pipelines.validation import SettingError
from grpo_tpu.checkpoint import networks
from grpo_tpu.config.schema import Config
from grpo_tpu.models.gemma3 import weights
from grpo_tpu.models.gemma3.config import CONFIGS
from grpo_tpu.models.gemma3.convert import huggingface
from tests.grpo_tpu.checkpoint import checkpointing

LIKE = dataclasses.replace(
  Config.from_config_dict(base.get_config()).model,
  name="gemma3_4b",
  compute_dtype="bfloat16",
)


def read(name):
  return networks.read_settings(name, LIKE, setting="rewards.models")


@pytest.fixture(scope="module", params=["", "score"])
def exported(request, tmp_path_factory):
  """A Hugging Face folder of the tiny size, and its head."""
  config = dataclasses.replace(CONFIGS["tiny"], has_score=bool(request.param))
  folder = tmp_path_factory.mktemp("exported")
  params = weights.random_params(config, 0, jnp.float32)
  huggingface.save(config, params, folder)
  return folder, request.param


def test_a_folder_tells_size_and_head_and_not_how_it_runs(exported):
  folder, head = exported
  found = read(f"hf:{folder}")
  assert (found.name, found.head, found.image_size) == ("tiny", head, None)
  assert found.weights == f"hf:{folder}"
  assert found.compute_dtype == LIKE.compute_dtype
  assert found.adapters is None


def test_a_run_tells_its_size_and_the_step_that_is_newest_now(
  tmp_path, write_run
):
  write_run(tmp_path, [3, 7], {"name": "tiny", "image_size": 24})
  found = read(f"run:{tmp_path}")
  assert found.weights == f"run:{tmp_path}@7"
  assert (found.name, found.head, found.image_size) == ("tiny", "", 24)
  assert read(f"run:{tmp_path}@3").weights == f"run:{tmp_path}@3"
  for record, words in (
    ({"name": "gemma4"}, "must be one of"),
    ({"name": 3}, "must be a string"),
    ({"name": "tiny", "image_size": "big"}, "must be an integer"),
    ({"name": "tiny", "image_size": 25}, "must be a multiple"),
    ({}, "must have a field"),
  ):
    _write_record(tmp_path, record)
    with pytest.raises(SettingError, match=rf"^rewards.models \(.*{words}"):
      read(f"run:{tmp_path}")
  (tmp_path / "run.json").unlink()
  with pytest.raises(SettingError, match="copy the whole folder of the run"):
    read(f"run:{tmp_path}")


def _write_record(folder, model):
  (folder / "run.json").write_text(json.dumps({"config": {"model": model}}))


@pytest.fixture
def write_run():
  def write(folder, steps, model):
    with checkpointing.opened(folder / "checkpoints", keep=9) as saved:
      for step in steps:
        saved.save(step, {"params": {"w": jnp.ones(step)}}, {}, force=True)
      saved.wait()
    _write_record(folder, model)

  return write


def test_a_fingerprint_is_of_contents_wherever_they_are(
  tmp_path, exported, write_run
):
  folder, _ = exported
  write_run(tmp_path / "run", [1, 2], {"name": "tiny"})
  for scheme, source, step in (
    ("hf", folder, ""),
    ("run", tmp_path / "run", "@2"),
  ):
    before = networks.fingerprint(f"{scheme}:{source}{step}")
    copy = shutil.copytree(source, tmp_path / "copy" / scheme)
    (copy / "README.md").write_text("a card")
    assert networks.fingerprint(f"{scheme}:{copy}{step}") == before
  assert networks.fingerprint(f"run:{source}@1") != before
  file = tmp_path / "copy" / "hf" / "model.safetensors"
  content = bytearray(file.read_bytes())
  content[-1] ^= 1
  file.write_bytes(content)
  changed = networks.fingerprint(f"hf:{file.parent}")
  assert changed != networks.fingerprint(f"hf:{folder}")


def test_a_fingerprint_in_a_bucket_is_that_of_the_same_files_here(
  bucket_here, exported
):
  folder, _ = exported
  place = "gs://bucket/model"
  objects.replace_folder(folder, place, last="config.json", what="model")
  there, here = map(networks.fingerprint, (f"hf:{place}", f"hf:{folder}"))
  assert there == here
  assert read("hf:gs://bucket/model").name == "tiny"


@pytest.mark.parametrize(
  "name",
  ["hf:/nowhere", "gguf:/etc/hostname", "gemma:/tmp", "run:/nowhere", "x"],
)
def test_what_holds_no_model_is_refused_in_words(name):
  with pytest.raises(SettingError, match="^rewards.models .* must name"):
    read(name)
