"""The files beside exported weights: copied, made, or refused in words."""

import json

import pytest

from data_pipelines.text import own_tokenizer
from data_pipelines.text import tokenizer as tokens
from grpo_tpu.checkpoint import companions
from grpo_tpu.models.gemma3 import config as gemma3_config

CONFIG = gemma3_config.CONFIGS["tiny"]
MADE = {
  *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
  *("chat_template.jinja", "preprocessor_config.json"),
  "processor_config.json",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  tokens.train(["What is 12 + 30?"] * 3, path, 500)
  return tokens.Tokenizer(path)


def record(workdir, path, fingerprint, weights="random:0"):
  """The run.json of a run that was given this tokenizer."""
  workdir.mkdir(exist_ok=True)
  values = {
    "weights": weights,
    "data": {own_tokenizer.OF_TOKENIZER: fingerprint},
    "config": {"data": {"tokenizer": str(path), "dir": ""}},
  }
  (workdir / "run.json").write_text(json.dumps(values))
  return f"run:{workdir}@3"


def test_a_run_with_its_own_tokenizer_gets_every_file(tokenizer, tmp_path):
  weights = record(tmp_path, tokenizer._path, tokenizer.fingerprint)
  files = companions.make_files(CONFIG, weights, "random:0")
  assert files.keys() == MADE
  assert files["tokenizer.model"] == tokenizer.model


def test_files_of_the_source_are_copied_and_the_rest_is_made(
  tokenizer, tmp_path
):
  source = tmp_path / "source"
  source.mkdir()
  kept = {"tokenizer.model": tokenizer.model, "processor_config.json": b"mine"}
  kept["tokenizer_config.json"] = b'{"chat_template": "mine"}'
  for name, content in kept.items():
    (source / name).write_bytes(content)
  (source / "secrets.txt").touch()
  (source / "generation_config.json").write_text('{"top_k": 64}')
  weights = record(tmp_path / "run", "", "", weights=f"hf:{source}")
  files = companions.make_files(CONFIG, weights, f"hf:{source}")
  made = {"tokenizer.json", "generation_config.json"}
  assert files.keys() == kept.keys() | made
  assert {name: files[name] for name in kept} == kept
  assert files["generation_config.json"] == {"top_k": 64}
  (source / "tokenizer_config.json").write_bytes(b"{}")
  files = companions.make_files(CONFIG, "random:0", "random:0", str(source))
  assert files.keys() == kept.keys() | made | {"chat_template.jinja"}
  (source / "generation_config.json").write_text("[")
  with pytest.raises(ValueError, match="generation_config.json is not JSON"):
    companions.make_files(CONFIG, weights, f"hf:{source}")


@pytest.mark.parametrize("change", ["gone", "another"])
def test_a_tokenizer_that_is_not_the_runs_is_refused_with_the_remedy(
  tokenizer, tmp_path, change
):
  path = tokenizer._path if change == "another" else tmp_path / "none.model"
  weights = record(tmp_path, path, "0" * 64)
  remedy = r"^export.tokenizer_dir \(''\) must name a folder with"
  with pytest.raises(ValueError, match=remedy):
    companions.make_files(CONFIG, weights, "random:0")


def test_a_source_that_is_gone_is_refused_unless_another_is_named(tmp_path):
  weights, origin = "run:R@3", f"hf:{tmp_path}/gone"
  lost = "R@3 started from hf:.*, which is gone"
  with pytest.raises(ValueError, match=lost):
    companions.make_files(CONFIG, weights, origin)
  assert companions.make_files(CONFIG, weights, origin, str(tmp_path))
  with pytest.raises(ValueError, match="export.tokenizer_dir .'/no/such'"):
    companions.make_files(CONFIG, weights, origin, "/no/such")


def test_weights_without_a_tokenizer_get_a_warning(caplog):
  files = companions.make_files(CONFIG, "random:0", "random:0")
  assert not files.keys() & {"tokenizer.json", "tokenizer.model"}
  assert "random:0 has no tokenizer" in caplog.text
