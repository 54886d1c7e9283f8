"""The card of an export says what the records say, and shows no path."""

import dataclasses
import json

import pytest
import yaml

from configs import base
from grpo_tpu.checkpoint import model_card
from grpo_tpu.config import schema


def model(**changes):
  values = base.get_config().to_dict()
  values["model"] |= changes
  return schema.Config.from_config_dict(values).model


@pytest.fixture
def run(tmp_path):
  """A run of 2 steps on 200 problems, after one that drew its weights."""
  data = tmp_path / "problems"
  data.mkdir()
  manifest = {"source": f"{tmp_path}/geo|metry", "fingerprint": "abc123"}
  manifest |= {"terms": "", "counts": {"train": 900, "eval": 200}}
  (data / "manifest.json").write_text(json.dumps(manifest))
  config = base.get_config().to_dict()
  config["data"] |= {"dir": str(data), "eval_split": "eval"}
  config["model"]["weights"] = "random:0"
  config["optimizer"]["learning_rate"] = 3e-4
  for name, weights in (
    ("first", "random:0"),
    ("second", f"run:{tmp_path}/first@9"),
  ):
    (tmp_path / name).mkdir()
    values = json.loads(
      json.dumps({"weights": weights, "config": config}, default=str)
    )
    (tmp_path / name / "run.json").write_text(json.dumps(values))
  rows = [{"step": 0, "eval/accuracy": 0.5}, {"step": 1}]
  rows += [{"step": 2, "eval/accuracy": 0.75}]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (tmp_path / "second" / "metrics.jsonl").write_text(lines)
  return tmp_path / "second"


def card(weights, adapter=False, **changes):
  stages, origin = model_card.read_stages(weights)
  return model_card.render(model(**changes), stages, origin, adapter)


def front_matter(text):
  _, front, _ = text.split("---\n", 2)
  return yaml.safe_load(front)


def test_a_card_has_the_facts_of_its_runs_and_no_path(run):
  text = card(f"run:{run}@2")
  assert str(run.parent) not in text
  assert text == card(f"run:{run}@2")
  # 100 and 150 of 200 problems, with Wilson's intervals.
  assert "| 50.0 % (43.1 to 56.9; 200 problems) |" in text
  assert "| 75.0 % (68.6 to 80.5; 200 problems) |" in text
  assert "| optimizer.learning_rate | 0.0003 | 0.0003 |" in text
  assert r"from geo\|metry; train 900 problems; eval 200" in text
  assert "This is step 2 of the run `second`." in text
  assert "weights drawn at random" in text
  assert "license" not in front_matter(text)


def test_what_was_not_measured_is_not_told(run):
  text = card(f"run:{run}@1")
  assert (
    "| eval/accuracy | 50.0 % (43.1 to 56.9; 200 problems) | not measured |"
    in text
  )
  (run / "metrics.jsonl").unlink()
  assert "Not measured." in card(f"run:{run}@1")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_released_model_brings_its_licence(adapter, tmp_path):
  folder = tmp_path / "gemma-3-270m"
  stages, origin = [], f"hf:{folder}"
  changes = {"name": "gemma3_270m", "weights": "random:0"}
  text = model_card.render(model(**changes), stages, origin, adapter)
  front = front_matter(text)
  assert front["license"] == "gemma"
  assert front["base_model"] == "google/gemma-3-270m"
  assert front["library_name"] == ("peft" if adapter else "transformers")
  assert front["pipeline_tag"] == "text-generation"
  assert "Gemma Terms of Use" in text and str(tmp_path) not in text


def test_runs_are_followed_to_where_they_started(run):
  stages, origin = model_card.read_stages(f"run:{run}@2")
  found = [(stage.workdir.name, stage.step) for stage in stages]
  assert (found, origin) == ([("second", 2), ("first", 9)], "random:0")
  (run / "run.json").write_text(json.dumps({"weights": f"run:{run}@2"}))
  stages, _ = model_card.read_stages(f"run:{run}@2")
  assert len(stages) == 100  # Damaged: it starts from itself.
  assert model_card.read_stages("hf:DIR") == ([], "hf:DIR")


@pytest.mark.parametrize(
  "name, content",
  [
    ("second/metrics.jsonl", "[1]\n"),
    ("second/metrics.jsonl", '{"step": "1"}\n{"step": []}\n'),
    ("problems/manifest.json", '{"counts": [1], "source": 3}'),
    ("problems/manifest.json", '{"counts": {"eval": "many"}}'),
    ("first/run.json", '{"weights": "random:0", "config": {"data": [1]}}'),
    ("first/run.json", '{"weights": "random:0", "config": 1}'),
  ],
)
def test_damaged_records_leave_facts_out(run, name, content):
  (run.parent / name).write_text(content)
  assert "This is step 2 of the run `second`." in card(f"run:{run}@2")


@pytest.mark.parametrize("adapter", [False, True])
def test_a_reward_model_says_how_it_scores_and_not_how_it_chats(run, adapter):
  rows = [{"step": 2, "eval/pairwise_accuracy": 0.875, "eval/accuracy": 0.5}]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (run / "metrics.jsonl").write_text(lines)
  stages, origin = model_card.read_stages(f"run:{run}@2")
  settings = dataclasses.replace(model(), head="score")
  text = model_card.render(settings, stages, origin, adapter)
  front = front_matter(text)
  assert front["pipeline_tag"] == "text-classification"
  assert front["tags"] == ["gemma3", "reward-model"]
  assert "| eval/pairwise_accuracy | not measured | 87.5 % |" in text
  assert "AutoModelForSequenceClassification" in text
  assert "vllm serve" not in text and "generate" not in text
  code = text.split("```python\n")[1].split("```")[0]
  compile(code, "card", "exec")
  assert ("peft" in code) == adapter
