"""--mode=export, and starting from what it wrote: `model.weights=hf:DIR`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from configs import base
from data_pipelines import validation
from data_pipelines.text import own_tokenizer
from grpo_tpu.checkpoint import export, load, manifest
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import sharding
from grpo_tpu.rl import masters, train_state
from tests.grpo_tpu.checkpoint import checkpointing


def changed(**sections):
  values = base.get_config().to_dict()
  values["mesh"]["fsdp"] = 8
  for section, settings in sections.items():
    values[section] |= settings
  return run_config.Config.from_config_dict(values)


def run_export(config, workdir):
  export.run(
    config.model,
    config.export,
    config.mesh,
    str(workdir),
  )


def save(workdir, *steps):
  """Checkpoints whose parameters are the seed's, times the step."""
  config = changed(model={"weights": "random:1"})
  mesh = sharding.make_mesh(replica=1, fsdp=8, tensor=1)
  params = load.load_params(config.model, mesh)
  with checkpointing.opened(workdir / "checkpoints", keep=9) as checkpoints:
    for step in steps:
      scaled = jax.tree.map(lambda x, step=step: x * step, params)
      at = jax.device_put(jnp.int32(step), sharding.replicated_sharding(mesh))
      state = train_state.TrainState(at, at, scaled, ())
      checkpoints.save(step, state, {})
  return params, mesh


def assert_equal(actual, expected, factor):
  for got, want in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(got, np.asarray(want) * factor)


def test_the_newest_or_a_given_step_goes_out_and_can_be_started_from(tmp_path):
  params, mesh = save(tmp_path, 2, 3)
  for step, factor in ((None, 3), (2, 2)):
    named = f"run:{tmp_path}" + ("" if step is None else f"@{step}")
    config = changed(export={"dtype": "float32"}, model={"weights": named})
    export.check(config.model, config.export, str(tmp_path))
    run_export(config, tmp_path)
    there = tmp_path / f"export_{step}"
    (tmp_path / "export").rename(there)
    # As many rows as the model has ids, and no placeholder's.
    start = changed(model={"weights": f"hf:{there}"})
    assert_equal(load.load_params(start.model, mesh), params, factor)
    assert load.resolve_weights(start.model.weights) == f"hf:{there}"


SAMPLING = {"do_sample": True, "top_k": 64, "top_p": 0.95}


@pytest.mark.parametrize(
  "named", ["hf", "run", "run of a run", "tokenizer_dir"]
)
def test_an_export_keeps_how_its_source_asks_to_be_sampled_from(
  tmp_path, named
):
  """Of whatever it began as; the three ids alone are written anew."""
  source, workdir = tmp_path / "source", tmp_path / "run"
  source.mkdir()
  run_export(changed(model={"weights": "random:1"}), source)
  hf = source / "export"
  file = hf / "generation_config.json"
  ids = json.loads(file.read_text())
  file.write_text(json.dumps(SAMPLING | {"eos_token_id": 7}))
  export_settings = {}
  weights = f"hf:{hf}"
  if named.startswith("run"):
    save(workdir, 2)
    first = workdir if named == "run" else tmp_path / "first"
    first.mkdir(exist_ok=True)
    record = {"data": {}, "config": {"data": {"tokenizer": "", "dir": ""}}}
    record["data"][own_tokenizer.OF_TOKENIZER] = ""
    (first / "run.json").write_text(json.dumps(record | {"weights": weights}))
    if named == "run of a run":
      record |= {"weights": f"run:{first}@9"}
      (workdir / "run.json").write_text(json.dumps(record))
    weights = f"run:{workdir}"
  elif named == "tokenizer_dir":
    weights, export_settings = "random:1", {"tokenizer_dir": str(hf)}
  config = changed(model={"weights": weights}, export=export_settings)
  export.check(config.model, config.export, str(workdir))
  run_export(config, workdir)
  written = json.loads((workdir / "export" / file.name).read_text())
  assert written == SAMPLING | ids
  assert set(ids) == {"bos_token_id", "eos_token_id", "pad_token_id"}


def test_a_damaged_file_of_the_source_is_refused_at_once(tmp_path):
  (tmp_path / "generation_config.json").write_text("[")
  config = changed(
    model={"weights": "random:1"}, export={"tokenizer_dir": str(tmp_path)}
  )
  with pytest.raises(ValueError, match="generation_config.json is not JSON"):
    export.check(config.model, config.export, str(tmp_path))


def test_masters_go_out_in_float32_and_start_another_run(tmp_path):
  """Of a run in bfloat16; an export in bfloat16 has the weights that ran."""
  config = changed(model={"weights": "random:1", "param_dtype": "bfloat16"})
  mesh = sharding.make_mesh(replica=1, fsdp=8, tensor=1)
  fine = load.load_params(changed(model={"weights": "random:1"}).model, mesh)
  params = load.load_params(config.model, mesh)
  kept = jax.tree.map(
    lambda x, y: optax.MaskedNode() if x.dtype == y.dtype else x, fine, params
  )
  at = jax.device_put(jnp.int32(1), sharding.replicated_sharding(mesh))
  state = train_state.TrainState(at, at, params, masters.MastersState(kept, ()))
  with checkpointing.opened(tmp_path / "checkpoints") as checkpoints:
    checkpoints.save(1, state, {})
  run = {"weights": f"run:{tmp_path}"}
  assert_equal(load.load_params(changed(model=run).model, mesh), fine, 1)
  for dtype, expected in (("float32", fine), ("bfloat16", params)):
    run_export(
      changed(model=run | {"param_dtype": "bfloat16"}, export={"dtype": dtype}),
      tmp_path,
    )
    there = tmp_path / f"export_{dtype}"
    (tmp_path / "export").rename(there)
    start = changed(model={"weights": f"hf:{there}", "param_dtype": dtype})
    got = load.load_params(start.model, mesh)
    assert_equal(got["layers"], expected["layers"], 1)


def test_a_model_without_adapters_has_none_to_export(tmp_path):
  config = changed(model={"weights": "random:1"}, export={"adapter": True})
  with pytest.raises(
    validation.SettingError, match=r"export.adapter \(True\).*random:1 has none"
  ):
    run_export(config, tmp_path)
  assert not (tmp_path / "export").exists()


def test_what_cannot_be_exported_is_refused_at_once(tmp_path):
  folder = epath.Path(tmp_path / "checkpoints" / "00000007")
  folder.mkdir(parents=True)
  workdir = str(tmp_path)
  model = {"weights": f"run:{tmp_path}"}
  config = changed(model=model)
  with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
    export.check(config.model, config.export, workdir)
  record = {"step": 7, "leaves": {}, "meta": {}}
  (folder / "meta").mkdir()
  (folder / "meta" / "metadata").write_text(json.dumps(record))
  manifest.write(folder, {"score": None})
  config = changed(model=model, export={"tokenizer_dir": "/no/such"})
  with pytest.raises(ValueError, match="export.tokenizer_dir .'/no/such'"):
    export.check(config.model, config.export, workdir)
  (tmp_path / "export").mkdir()
  (tmp_path / "export" / "config.json").touch()
  with pytest.raises(ValueError, match="export must not hold a checkpoint"):
    export.check(changed().model, changed().export, workdir)


def test_weights_of_another_model_are_refused_with_the_settings(tmp_path):
  config = changed(model={"weights": "random:1"})
  run_export(config, tmp_path)
  weights = {"weights": f"hf:{tmp_path}/export"}
  changed(model=weights)  # Of the model that it is.
  named = r"model.weights \('hf:.*model.name \('gemma3_4b'\).*embed_dim \(64, "
  with pytest.raises(ValueError, match=named):
    changed(model=weights | {"name": "gemma3_4b"})
  (tmp_path / "export" / "model.safetensors").unlink()
  with pytest.raises(ValueError, match="model.safetensors: cannot be read"):
    changed(model=weights)
  with pytest.raises(ValueError, match="no/such/config.json cannot be read"):
    changed(model={"weights": "hf:no/such"})
