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
  *("chat_template.jinja", "generation_config.json"),
  *("preprocessor_config.json", "processor_config.json"),
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
  opened = companions.open_tokenizer(weights, "")
  assert opened.fingerprint == tokenizer.fingerprint
  assert companions.make_files(CONFIG, "", opened).keys() == MADE


def test_files_of_the_source_are_copied_and_the_rest_is_made(
  tokenizer, tmp_path
):
  kept = {"tokenizer.json": b"{}", "processor_config.json": b"mine"}
  config = b'{"chat_template": "mine"}'
  for name, content in (kept | {"tokenizer_config.json": config}).items():
    (tmp_path / name).write_bytes(content)
  (tmp_path / "secrets.txt").touch()
  (tmp_path / "generation_config.json").write_text('{"top_k": 64}')
  files = companions.make_files(CONFIG, str(tmp_path), tokenizer)
  sampling = {"generation_config.json": {"top_k": 64}}
  assert files == kept | sampling | {"tokenizer_config.json": config}
  (tmp_path / "tokenizer_config.json").write_bytes(b"{}")
  files = companions.make_files(CONFIG, str(tmp_path), tokenizer)
  assert files.keys() - kept.keys() == {
    *("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
  }


@pytest.mark.parametrize("change", ["gone", "another"])
def test_a_tokenizer_that_is_not_the_runs_is_refused_with_the_remedy(
  tokenizer, tmp_path, change
):
  path = tokenizer._path if change == "another" else tmp_path / "none.model"
  weights = record(tmp_path, path, "0" * 64)
  with pytest.raises(
    ValueError,
    match=r"^export.tokenizer_dir \(''\) must name .*run:.*@3 cannot",
  ):
    companions.open_tokenizer(weights, "")


def test_a_source_that_is_gone_is_refused_unless_another_is_named(tmp_path):
  weights, origin = "run:R@3", f"hf:{tmp_path}/gone"
  with pytest.raises(
    ValueError, match=r"R@3 started from hf:.*, which is gone"
  ):
    companions.find_folder(weights, origin, "")
  named = companions.find_folder(weights, origin, str(tmp_path))
  assert named == str(tmp_path)
  assert companions.find_folder(weights, f"hf:{tmp_path}", "") == named
  with pytest.raises(ValueError, match="export.tokenizer_dir .'/no/such'"):
    companions.find_folder(weights, origin, "/no/such")


def test_weights_without_a_tokenizer_get_a_warning(caplog):
  assert companions.open_tokenizer("random:0", "") is None
  assert "random:0 has no tokenizer" in caplog.text
