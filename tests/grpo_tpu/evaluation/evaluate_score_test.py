"""What --mode=evaluate writes is worth the same to the scoring command."""

import json

import pytest

from data_pipelines.scoring import score_file
from grpo_tpu.evaluation import scores as figures
from tests.grpo_tpu import scripted


def test_a_file_of_evaluate_scores_to_the_same_accuracy(tmp_path):
  """A problem that was not asked is wrong to both, readable or not."""
  tokenizer = scripted.make_tokenizer(tmp_path)
  completions = {f"p{i}": [x[2]] for i, x in enumerate(scripted.SCRIPT)}
  run = scripted.make_run(tokenizer, completions)
  batches = scripted.batches_of(tokenizer, batch_size=11)
  result = run.evaluate(batches)
  path, out = tmp_path / "output.json", tmp_path / "out.json"
  written = {x.record["pid"]: x.record for x in result.greedy}
  path.write_text(json.dumps(written))
  scores = tmp_path / "scores.json"
  score_file.score_file(str(path), out=str(out), scores=str(scores))
  for record in json.loads(out.read_text()).values():
    assert record == written[record["pid"]]
  found = json.loads(scores.read_text())
  assert found["records"] == found["scored"] == len(scripted.SCRIPT)
  whole, *rows = found["rows"]
  wanted = figures.compute(result.greedy, samples=(), ks=(), ablated={})
  assert whole["strict"] == wanted["accuracy"]
  assert whole["strict"]["share"] == pytest.approx(
    float(result.scalars["eval/accuracy"])
  )
  assert [
    {"dimension": x["dimension"], "name": x["name"]} | x["strict"] for x in rows
  ] == wanted["slices"]
