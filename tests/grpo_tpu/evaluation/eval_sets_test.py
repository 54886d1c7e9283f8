"""Further sets are opened with the tokenizer and the template of the run."""

import dataclasses

import pytest

from data_pipelines.sources import data_dirs, stored
from data_pipelines.text import chat_prompts
from grpo_tpu.config.schema import Config
from grpo_tpu.evaluation import eval_sets
from tests.grpo_tpu.config.schema_test import built
from tests.grpo_tpu.scripted import PROBLEMS, Source


@dataclasses.dataclass(frozen=True)
class Data:
  """The fields of a `Dataset` that a set changes, and one that it keeps."""

  settings: object
  eval: object
  identity: dict
  template: chat_prompts.Template = chat_prompts.TAGGED
  tokenizer: str = "the run's"
  eval_parts: tuple[str, ...] = ()


@pytest.fixture
def opened(monkeypatch):
  """Opens sets whose folders all hold splits "test" and "mini"."""

  def open_dir(setting, name, folder):
    manifest = {"counts": {"test": 2, "mini": 1}, "fingerprint": f"of {folder}"}
    return data_dirs.DataDir(setting, name, folder, 1, manifest)

  monkeypatch.setattr(data_dirs, "open_dir", open_dir)
  monkeypatch.setattr(data_dirs, "parts", lambda dirs, split: (split,))
  monkeypatch.setattr(
    stored, "source", lambda folder, split: [f"{folder} {split}"]
  )

  def opened(*sets, **settings) -> tuple[Config, dict]:
    config = built({"eval.sets": sets} | settings)
    data = Data(config.data, Source([1, 2, 4]), {"own": "x"})
    return config, eval_sets.open_sets(config, data)

  return opened


def test_each_set_has_its_problems_and_shares_the_rest(opened):
  _, sets = opened(("geo", "G", "test"), ("more", "M", "mini"))
  assert list(sets) == ["", "geo", "more"]
  assert sets[""].identity == {"own": "x"}
  assert sets["more"].eval == ["M mini"]
  assert sets["more"].settings.eval_split == "mini"
  assert sets["more"].eval_parts == ("mini",)
  assert sets["more"].identity == {"eval.sets: records of more": "of M"}
  assert {each.tokenizer for each in sets.values()} == {"the run's"}


def test_a_split_that_the_folder_lacks_is_refused(opened):
  with pytest.raises(ValueError, match=r"^eval.sets \('val'\) .* test, mini"):
    opened(("geo", "G", "val"))


@pytest.mark.parametrize(
  ("metric", "is_written"),
  [
    ("eval/accuracy", True),
    ("eval/accuracy/text", True),
    ("eval/accuracy/multi_choice", True),
    ("eval/accuracy/list", False),
    ("eval/accuracy/hidden", False),
    ("eval/pass_at_2/hidden", False),
    ("eval/format/hidden", True),
  ],
)
def test_a_target_needs_a_problem_that_counts_for_it(
  opened, metric, is_written
):
  """Problems 1, 2 and 4 are an integer, a float and a choice of texts."""
  config, sets = opened(
    ("hidden", "H", "test"),
    **{"eval.num_samples": 2, "train.stop_when": f"{metric} >= 0.5"},
  )
  hidden = [dataclasses.replace(x, answer="") for x in PROBLEMS]
  sets["hidden"] = dataclasses.replace(sets["hidden"], eval=hidden)
  if is_written:
    eval_sets.check_targets(config, sets)
    return
  with pytest.raises(ValueError, match=r"^train.stop_when .*public answer"):
    eval_sets.check_targets(config, sets)
