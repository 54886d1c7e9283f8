"""A workdir stays the run it was started as."""

import dataclasses
import json
import os
import re

import pytest

from configs import base
from data_pipelines.text import chat_prompts
from grpo_tpu.config import schema as run_config
from grpo_tpu.observability import run_record

CONFIG = run_config.Config.from_config_dict(base.get_config())
IDENTITY = {
  "data.dir: its records": "aaaa",
  "data.dir: its tokenizer": "bbbb",
}
WEIGHTS = "run:/runs/warm@40"


def changed(section, **settings):
  part = dataclasses.replace(getattr(CONFIG, section), **settings)
  return dataclasses.replace(CONFIG, **{section: part})


@pytest.fixture
def card(tmp_path):
  run_record.write(str(tmp_path), CONFIG, IDENTITY, WEIGHTS)
  return run_record.read(str(tmp_path))


def test_a_workdir_without_a_card_is_free_for_any_run(tmp_path):
  assert run_record.read(str(tmp_path)) is None
  run_record.check(None, CONFIG, IDENTITY, str(tmp_path))


def test_a_card_that_was_written_lets_the_same_run_go_on(card):
  run_record.check(card, CONFIG, IDENTITY, "W")
  assert card["weights"] == WEIGHTS
  # As JSON has it: tuples are lists there.
  assert card["config"] == json.loads(json.dumps(CONFIG.to_dict()))
  assert card["accepted_mathvista_training_terms"] is False
  assert card["packages"]["jax"] and card["data"] == IDENTITY
  (attempt,) = card["attempts"]
  assert attempt["devices"] == {"kind": "cpu", "count": 8, "hosts": 1}
  assert attempt["revision"] and len(attempt["code"]) == 12
  assert card["end"] is attempt["ended"] is attempt["exit_code"] is None


def test_every_start_is_an_attempt_and_has_its_own_end(card, tmp_path):
  """One that was killed has none; the words are those of the last end."""
  words = {"exit_code": 75, "reason": "preempted", "step": 4, "best": None}
  run_record.close(tmp_path, words)
  run_record.write(str(tmp_path), CONFIG, IDENTITY, WEIGHTS)
  between = run_record.read(str(tmp_path))
  assert between is not None and between["end"] is None
  run_record.write(str(tmp_path), CONFIG, IDENTITY, WEIGHTS)
  run_record.close(tmp_path, words | {"exit_code": 0, "step": 9})
  card = run_record.read(str(tmp_path))
  assert card is not None
  assert [a["exit_code"] for a in card["attempts"]] == [75, None, 0]
  assert [a["step"] for a in card["attempts"]] == [4, None, 9]
  times = [(a["started"], a["ended"]) for a in card["attempts"]]
  assert times[0][0] <= times[0][1] <= times[1][0] <= times[2][0] <= times[2][1]
  assert card["end"] == words | {"exit_code": 0, "step": 9}
  run_record.check(card, CONFIG, IDENTITY, "W")


@pytest.mark.parametrize(
  ("config", "identity", "name", "now", "before"),
  [
    (dataclasses.replace(CONFIG, seed=7), {}, "seed", 7, 0),
    (
      changed("model", name="gemma3_1b"),
      {},
      "model.name",
      "'gemma3_1b'",
      "'tiny'",
    ),
    (
      changed("model", weights="random:1"),
      {},
      "model.weights",
      "'random:1'",
      "'random:0'",
    ),
    (
      changed("data", kind="preference"),
      {},
      "data.kind",
      "'preference'",
      "'online'",
    ),
    (
      changed("data", prompts_per_step=128),
      {},
      "data.prompts_per_step",
      128,
      64,
    ),
    (
      changed("data", prompt_template="reasoned"),
      {},
      "data.prompt_template",
      "'reasoned'",
      "'tagged'",
    ),
    (
      changed("data", shuffle_options=True),
      {},
      "data.shuffle_options",
      True,
      False,
    ),
    (
      CONFIG,
      {"data.dir: its records": "cc"},
      "data.dir: its records",
      "'cc'",
      "'aaaa'",
    ),
    (
      CONFIG,
      {"data.dir: its tokenizer": "cc"},
      "data.dir: its tokenizer",
      "'cc'",
      "'bbbb'",
    ),
  ],
  ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_run_is_refused_with_both_values(
  card, config, identity, name, now, before
):
  with pytest.raises(ValueError) as caught:
    run_record.check(card, config, IDENTITY | identity, "/runs/1")
  said = str(caught.value)
  assert said.startswith("--workdir (/runs/1) must be given")
  changes = [line for line in said.splitlines() if line.startswith("  ")]
  # A template brings its text with it.
  assert changes[0] == f"  {name}: was {before}, is {now}"
  assert all(line.startswith(f"  {name}") for line in changes)
  assert "checkpoint.accept_changes=True" in said


def test_adapters_of_a_run_stay_what_they_are(card, tmp_path):
  """A run that has none says nothing of them, as cards of before do."""
  assert not [name for name in card["essence"] if "lora" in name]
  settings = dataclasses.replace(CONFIG.model.lora, rank=4)
  config = changed("model", lora=settings)
  with pytest.raises(ValueError, match="  model.lora.rank: was None, is 4\n"):
    run_record.check(card, config, IDENTITY, "W")
  run_record.write(str(tmp_path), config, IDENTITY, WEIGHTS)
  adapted = run_record.read(str(tmp_path))
  run_record.check(adapted, config, IDENTITY, "W")
  with pytest.raises(ValueError, match="  model.lora.rank: was 4, is None\n"):
    run_record.check(adapted, CONFIG, IDENTITY, "W")
  for name, value in (("alpha", 8.0), ("targets", ("q",))):
    other = dataclasses.replace(settings, **{name: value})
    with pytest.raises(ValueError, match=f"  model.lora.{name}: was "):
      run_record.check(adapted, changed("model", lora=other), IDENTITY, "W")


def crops(**numbers):
  settings = dataclasses.replace(CONFIG.data.pan_and_scan, **numbers)
  return changed("data", pan_and_scan=settings)


def test_a_run_goes_on_with_the_crops_it_was_started_with(card, tmp_path):
  run_record.check(card, crops(max_num_crops=3), IDENTITY, "W")
  with pytest.raises(
    ValueError, match="  data.pan_and_scan.enabled: was None, is T"
  ):
    run_record.check(card, crops(enabled=True), IDENTITY, "W")
  run_record.write(str(tmp_path), crops(enabled=True), IDENTITY, WEIGHTS)
  card = run_record.read(str(tmp_path))
  run_record.check(card, crops(enabled=True), IDENTITY, "W")
  for other in (CONFIG, crops(enabled=True, max_num_crops=3)):
    with pytest.raises(
      ValueError, match="  data.pan_and_scan.max_num_crops: was "
    ):
      run_record.check(card, other, IDENTITY, "W")


def test_a_template_that_was_worded_otherwise_is_refused(card, monkeypatch):
  """The hash of its text is in the card, not its name alone."""
  before = chat_prompts.TEMPLATES["tagged"]
  assert before.fingerprint in json.dumps(card)
  now = dataclasses.replace(before, instruction="Tag the final answer.")
  monkeypatch.setitem(chat_prompts.TEMPLATES, "tagged", now)
  with pytest.raises(
    ValueError, match="  data.prompt_template: its text: was"
  ) as e:
    run_record.check(card, CONFIG, IDENTITY, "W")
  assert now.fingerprint in str(e.value) and before.fingerprint in str(e.value)


@pytest.mark.parametrize(
  "config",
  [
    changed("train", num_steps=9),
    changed("train", microbatch_bundles=16),
    changed("eval", every_steps=3),
    changed("checkpoint", every_steps=3),
    changed("mesh", fsdp=8),
    changed("profile", steps=(3, 4)),
    changed("data", dir="/moved", worker_processes=2),
    changed("model", remat="none", attention="einsum"),
    changed("rewards", num_workers=1),
  ],
)
def test_a_run_may_go_on_with_another_plan_or_on_other_machines(card, config):
  run_record.check(card, config, IDENTITY, "W")


def test_the_number_of_steps_is_a_plan_unless_a_schedule_follows_it(tmp_path):
  cosine = changed("optimizer", schedule="cosine")
  run_record.write(str(tmp_path), cosine, IDENTITY, WEIGHTS)
  card = run_record.read(str(tmp_path))
  run_record.check(card, cosine, IDENTITY, "W")
  longer = dataclasses.replace(
    cosine, train=dataclasses.replace(cosine.train, num_steps=2000)
  )
  with pytest.raises(ValueError, match="  train.num_steps: was 1000, is 2000"):
    run_record.check(card, longer, IDENTITY, "W")


def test_all_that_changed_is_listed_and_may_be_accepted(card, tmp_path, caplog):
  """And stands in the card from then on, the run being the changed one."""
  new = dataclasses.replace(
    changed("optimizer", learning_rate=0.5, b2=0.9), seed=4
  )
  identity = IDENTITY | {"data.dir: its records": "cc"}
  with pytest.raises(ValueError) as caught:
    run_record.check(card, new, identity, "W")
  listed = [
    "  data.dir: its records: was 'aaaa', is 'cc'",
    "  optimizer.b2: was 0.99, is 0.9",
    "  optimizer.learning_rate: was 1e-06, is 0.5",
    "  seed: was 0, is 4",
  ]
  assert str(caught.value).splitlines()[1:-1] == listed
  accepting = dataclasses.replace(
    new, checkpoint=dataclasses.replace(new.checkpoint, accept_changes=True)
  )
  run_record.check(card, accepting, identity, "W")
  assert "\n".join(listed) in caplog.text
  run_record.write(str(tmp_path), accepting, identity, WEIGHTS)
  card = run_record.read(str(tmp_path))
  assert card is not None
  (changes,) = card["accepted_changes"]
  assert changes["seed"] == {"was": 0, "is": 4} and len(changes) == 4
  run_record.check(card, new, identity, "W")
  with pytest.raises(ValueError, match="  seed: was 4, is 0"):
    run_record.check(card, CONFIG, identity, "W")
  # Going on unchanged adds nothing; a second change comes after the first.
  run_record.write(str(tmp_path), new, identity, WEIGHTS)
  run_record.write(str(tmp_path), CONFIG, identity, WEIGHTS)
  card = run_record.read(str(tmp_path))
  assert card is not None
  assert [each["seed"]["is"] for each in card["accepted_changes"]] == [4, 0]


def test_a_checkpoint_of_other_data_is_refused_whatever_the_card_says():
  meta = IDENTITY | {"lora": {"rank": 3}}
  run_record.check_data(meta, CONFIG, IDENTITY, "W")
  foreign = meta | {"data.dir: its tokenizer": "zzzz"}
  with pytest.raises(ValueError, match="its tokenizer: was 'zzzz', is 'bbbb'"):
    run_record.check_data(foreign, CONFIG, IDENTITY, "W")
  with pytest.raises(ValueError, match="its records: was None, is 'aaaa'"):
    run_record.check_data({}, CONFIG, IDENTITY, "W")


def test_a_setting_that_is_yet_to_come_is_of_the_essence():
  """What is not is listed, so nothing is left out by forgetting it."""
  named = {
    name for name, _ in run_record._flat({"new": {"knob": 1}, "seed": 2})
  }
  assert named == {"new.knob", "seed"}
  for name in run_record._INCIDENTAL:
    value = CONFIG
    for part in name.split("."):
      value = getattr(value, part)


def test_a_kill_while_writing_leaves_the_card_before(tmp_path, monkeypatch):
  run_record.write(str(tmp_path), CONFIG, IDENTITY, WEIGHTS)

  def killed(*paths):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    run_record.write(str(tmp_path), CONFIG, IDENTITY, "random:9")
  card = run_record.read(str(tmp_path))
  assert card is not None and card["weights"] == WEIGHTS


def test_a_torn_card_is_an_error_that_names_it(tmp_path):
  (tmp_path / "run.json").write_text('{"essence": {')
  with pytest.raises(ValueError, match=re.escape(str(tmp_path / "run.json"))):
    run_record.read(str(tmp_path))


def test_a_run_is_not_continued_without_the_file_it_was_started_with(tmp_path):
  file = {"data.preference_file: its contents": "dddd"}
  run_record.write(str(tmp_path), CONFIG, IDENTITY | file, WEIGHTS)
  card = run_record.read(str(tmp_path))
  run_record.check(card, CONFIG, IDENTITY | file, "W")
  with pytest.raises(ValueError, match="preference_file.*'dddd'"):
    run_record.check(card, CONFIG, IDENTITY, "W")
