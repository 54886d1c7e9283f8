"""A workdir holds one run, which resumes only with the same settings."""

import dataclasses
import json
import os
import re

import pytest

from data_pipelines.storage import objects
from data_pipelines.text import chat_prompts
from data_pipelines.validation import SettingError
from grpo_tpu.config import defaults
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import collectives
from grpo_tpu.observability import run_record

DEFAULTS = defaults.get_config().to_dict()
CONFIG = run_config.Config.from_config_dict(DEFAULTS)
IDENTITY = {
  "data.dir: its records": "aaaa",
  "data.dir: its tokenizer": "bbbb",
}
WEIGHTS = "run:/runs/warm@40"


def changed(section, **settings):
  part = dataclasses.replace(getattr(CONFIG, section), **settings)
  return dataclasses.replace(CONFIG, **{section: part})


def record_of(workdir, config=CONFIG, identity=IDENTITY, values=DEFAULTS):
  return run_record.RunRecord(str(workdir), config.to_dict(), values, identity)


def write(workdir, config=CONFIG, identity=IDENTITY, weights=WEIGHTS):
  """Records an attempt, and reads the record back."""
  record_of(workdir, config, identity).write(weights)
  record = run_record.read(workdir)
  assert record is not None
  return record


def check(workdir, config=CONFIG, identity=IDENTITY):
  record_of(workdir, config, identity).check()


@pytest.fixture
def workdir(tmp_path):
  """The folder of a run with the default settings."""
  write(tmp_path)
  return tmp_path


def test_any_run_may_start_in_a_workdir_without_a_record(tmp_path):
  assert run_record.read(tmp_path) is None
  check(tmp_path)


def test_a_run_resumes_with_the_settings_of_its_record(workdir):
  check(workdir)
  card = run_record.read(workdir)
  assert card is not None and card["weights"] == WEIGHTS
  # JSON turns tuples into lists.
  assert card["config"] == json.loads(json.dumps(CONFIG.to_dict()))
  assert card["accepted_mathvista_training_terms"] is False
  assert card["packages"]["jax"] and card["data"] == IDENTITY
  (attempt,) = card["attempts"]
  assert attempt["devices"] == {"kind": "cpu", "count": 8, "hosts": 1}
  assert attempt["revision"] and len(attempt["code"]) == 12
  assert card["end"] is attempt["ended"] is attempt["exit_code"] is None


def test_the_record_shows_the_values_that_run(tmp_path):
  """And a resume still compares what the user set."""
  shown = CONFIG.to_resolved_dict()
  record = dataclasses.replace(record_of(tmp_path), resolved=shown)
  record.write(WEIGHTS)
  saved = run_record.read(tmp_path)
  assert saved is not None and saved["config"]["objective"]["beta"] == 0.0
  assert saved["essence"]["objective.beta"] is None
  check(tmp_path)


def test_every_start_is_an_attempt_and_has_its_own_end(workdir):
  """A killed attempt has no end; `end` is that of the last attempt."""
  words = {"exit_code": 75, "reason": "preempted", "step": 4, "best": None}
  run_record.close(workdir, words)
  assert write(workdir)["end"] is None
  write(workdir)
  run_record.close(workdir, words | {"exit_code": 0, "step": 9})
  record = run_record.read(workdir)
  assert record is not None
  attempts = record["attempts"]
  assert [a["exit_code"] for a in attempts] == [75, None, 0]
  assert [a["step"] for a in attempts] == [4, None, 9]
  times = [(a["started"], a["ended"]) for a in attempts]
  assert times[0][0] <= times[0][1] <= times[1][0] <= times[2][0] <= times[2][1]
  assert record["end"] == words | {"exit_code": 0, "step": 9}
  check(workdir)


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
      "''",
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
def test_a_changed_setting_is_refused_with_both_values(
  workdir, config, identity, name, now, before
):
  with pytest.raises(ValueError) as caught:
    check(workdir, config, IDENTITY | identity)
  said = str(caught.value)
  assert said.startswith(f"--workdir ({workdir}) has a run that was started")
  changes = [line for line in said.splitlines() if line.startswith("  ")]
  # A template brings a second line, for its text.
  assert changes[0] == f"  {name}: was {before}, is {now}"
  assert all(line.startswith(f"  {name}") for line in changes)
  assert "checkpoint.accept_changes=True" in said


def test_the_adapters_of_a_run_stay_the_same(workdir, tmp_path_factory):
  """The record of a run without adapters does not mention them."""
  record = run_record.read(workdir)
  assert record is not None
  assert not [name for name in record["essence"] if "lora" in name]
  settings = dataclasses.replace(CONFIG.model.lora, rank=4)
  config = changed("model", lora=settings)
  with pytest.raises(ValueError, match="  model.lora.rank: was 0, is 4\n"):
    check(workdir, config)
  adapted = tmp_path_factory.mktemp("adapted")
  write(adapted, config)
  check(adapted, config)
  with pytest.raises(ValueError, match="  model.lora.rank: was 4, is 0\n"):
    check(adapted)
  for name, value in (("alpha", 8.0), ("targets", ("q",))):
    other = dataclasses.replace(settings, **{name: value})
    with pytest.raises(ValueError, match=f"  model.lora.{name}: was "):
      check(adapted, changed("model", lora=other))


def crops(**numbers):
  settings = dataclasses.replace(CONFIG.data.pan_and_scan, **numbers)
  return changed("data", pan_and_scan=settings)


def test_a_run_resumes_only_with_its_crops(workdir, tmp_path_factory):
  check(workdir, crops(max_num_crops=3))
  with pytest.raises(
    ValueError, match="  data.pan_and_scan.enabled: was False, is True"
  ):
    check(workdir, crops(enabled=True))
  cropped = tmp_path_factory.mktemp("cropped")
  write(cropped, crops(enabled=True))
  check(cropped, crops(enabled=True))
  for other, name in (
    (CONFIG, "enabled"),
    (crops(enabled=True, max_num_crops=3), "max_num_crops"),
  ):
    with pytest.raises(ValueError, match=f"  data.pan_and_scan.{name}: was "):
      check(cropped, other)


def forget(workdir, *names):
  """Makes the record one of a version that did not have these settings."""
  record = run_record.read(workdir)
  assert record is not None
  for name in names:
    del record["essence"][name]
  (workdir / "run.json").write_text(json.dumps(record))


def test_a_setting_that_the_record_lacks_counts_as_its_default(workdir):
  """So a new setting stops no run of an older version."""
  forget(workdir, "shaping.max_batches", "rollout.stop_strings")
  check(workdir)
  with pytest.raises(
    ValueError, match="\n  shaping.max_batches: was 3, is 5\n[^ ]"
  ):
    check(workdir, changed("shaping", max_batches=5))
  assert write(workdir)["accepted_changes"] == []


def test_data_that_the_record_lacks_are_a_change(workdir):
  forget(workdir, "data.dir: its records")
  with pytest.raises(ValueError, match="its records: was None, is 'aaaa'"):
    check(workdir)


def test_a_template_with_another_text_is_refused(workdir, monkeypatch):
  """The record has the hash of the text besides the name."""
  before = chat_prompts.TEMPLATES["tagged"]
  assert before.fingerprint in (workdir / "run.json").read_text()
  now = dataclasses.replace(before, instruction="Tag the final answer.")
  monkeypatch.setitem(chat_prompts.TEMPLATES, "tagged", now)
  with pytest.raises(
    ValueError, match="  data.prompt_template: its text: was"
  ) as e:
    check(workdir)
  assert now.fingerprint in str(e.value) and before.fingerprint in str(e.value)


def test_a_template_file_is_known_by_its_name_and_its_text(tmp_path):
  """Its folder may be another one, as on another machine."""
  here = changed("data", prompt_template="/here/mine.jinja")
  there = changed("data", prompt_template="/there/mine.jinja")
  text = {"data.prompt_template: its text": "cccc"}
  write(tmp_path, here, IDENTITY | text)
  check(tmp_path, there, IDENTITY | text)
  for config, identity in (
    (here, IDENTITY | {"data.prompt_template: its text": "dddd"}),
    (changed("data", prompt_template="/here/other.jinja"), IDENTITY | text),
    (CONFIG, IDENTITY),
  ):
    with pytest.raises(ValueError, match="  data.prompt_template"):
      check(tmp_path, config, identity)
  with pytest.raises(ValueError, match="data.system_prompt: was '', is 'Hi'"):
    config = changed(
      "data", prompt_template="/here/mine.jinja", system_prompt="Hi"
    )
    check(tmp_path, config, IDENTITY | text)


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
def test_a_run_may_resume_with_another_length_or_machine(workdir, config):
  check(workdir, config)


def test_the_number_of_steps_must_match_if_a_schedule_depends_on_it(tmp_path):
  cosine = changed("optimizer", schedule="cosine")
  write(tmp_path, cosine)
  check(tmp_path, cosine)
  longer = dataclasses.replace(
    cosine, train=dataclasses.replace(cosine.train, num_steps=2000)
  )
  with pytest.raises(ValueError, match="  train.num_steps: was 1000, is 2000"):
    check(tmp_path, longer)


def test_all_changes_are_listed_and_can_be_accepted(workdir, caplog):
  """The record lists them too, and has the new settings from then on."""
  new = dataclasses.replace(
    changed("optimizer", learning_rate=0.5, b2=0.9), seed=4
  )
  identity = IDENTITY | {"data.dir: its records": "cc"}
  with pytest.raises(ValueError) as caught:
    check(workdir, new, identity)
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
  check(workdir, accepting, identity)
  assert "\n".join(listed) in caplog.text
  (changes,) = write(workdir, accepting, identity)["accepted_changes"]
  assert changes["seed"] == {"was": 0, "is": 4} and len(changes) == 4
  check(workdir, new, identity)
  with pytest.raises(ValueError, match="  seed: was 4, is 0"):
    check(workdir, CONFIG, identity)
  # Resuming unchanged adds nothing; a second change comes after the first.
  write(workdir, new, identity)
  record = write(workdir, CONFIG, identity)
  assert [each["seed"]["is"] for each in record["accepted_changes"]] == [4, 0]


def test_a_checkpoint_of_other_data_is_refused_whatever_the_record(workdir):
  record = record_of(workdir)
  meta = IDENTITY | {"lora": {"rank": 3}}
  record.check_data(meta)
  foreign = meta | {"data.dir: its tokenizer": "zzzz"}
  with pytest.raises(ValueError, match="its tokenizer: was 'zzzz', is 'bbbb'"):
    record.check_data(foreign)
  with pytest.raises(ValueError, match="its records: was None, is 'aaaa'"):
    record.check_data({})


def test_a_new_setting_must_match_unless_it_is_listed():
  settings = CONFIG.to_dict() | {"new": {"knob": 1}}
  record = run_record.RunRecord("W", settings, DEFAULTS, {})
  assert record._must_match()["new.knob"] == 1
  for name in run_record._MAY_DIFFER:
    value = CONFIG
    for part in name.split("."):
      value = getattr(value, part)


def test_a_kill_while_writing_leaves_the_old_record(workdir, monkeypatch):
  def killed(*paths):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    write(workdir, weights="random:9")
  record = run_record.read(workdir)
  assert record is not None and record["weights"] == WEIGHTS


@pytest.mark.parametrize(
  "content",
  [
    *(b'{"essence": {', b"", b"{}", b"[]", b"3", b"null", b"\xff\xfe{}"),
    *(b"[" * 10**6, b'{"attempts": []}'),
  ],
  ids=lambda content: content[:16].decode("latin-1"),
)
def test_the_error_of_a_damaged_record_names_the_file(tmp_path, content):
  (tmp_path / "run.json").write_bytes(content)
  path = re.escape(str(tmp_path / "run.json"))
  with pytest.raises(
    SettingError, match=f"^{path} must be the record of a run, but cannot"
  ) as error:
    check(tmp_path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("change", "rule"),
  [
    ({"essence": []}, "'essence' in it must be an object"),
    ({"weights": 3}, "'weights' in it must be a string"),
    ({"attempts": []}, "'attempts' in it must not be empty"),
    ({"attempts": [3]}, "item 0 of its attempts must be an object"),
    ({"accepted_changes": {}}, "'accepted_changes' in it must be a list"),
    ({"config": [1]}, "'config' in it must be an object"),
    ({"config": {"model": 3}}, "'model' in its config must be an object"),
    (
      {"config": {"data": {"dir": 3}}},
      "'dir' in its config.data must be a str",
    ),
  ],
)
def test_a_record_of_another_program_is_refused(workdir, change, rule):
  path = workdir / "run.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(SettingError, match=rule):
    check(workdir)


def test_a_pipe_or_a_folder_is_no_record(tmp_path):
  os.mkfifo(tmp_path / "run.json")
  with pytest.raises(SettingError, match="must be a regular file"):
    check(tmp_path)
  (tmp_path / "run.json").unlink()
  (tmp_path / "run.json").mkdir()
  with pytest.raises(SettingError, match="must be a regular file"):
    check(tmp_path)


def test_a_lost_record_is_said_at_the_end(workdir):
  (workdir / "run.json").unlink()
  with pytest.raises(ValueError, match="the file is gone"):
    run_record.close(workdir, {"exit_code": 75, "reason": "", "step": 4})
  assert not (workdir / "run.json").exists()


def test_a_run_does_not_resume_without_its_file_of_completions(tmp_path):
  file = {"data.preference_file: its contents": "dddd"}
  write(tmp_path, identity=IDENTITY | file)
  check(tmp_path, identity=IDENTITY | file)
  with pytest.raises(ValueError, match="preference_file.*'dddd'"):
    check(tmp_path)


def test_a_record_in_a_bucket_is_put_whole_and_read_back(bucket_here):
  workdir = "gs://bucket/runs/one"
  record_of(workdir).write("random:0")
  run_record.close(workdir, {"exit_code": 75, "reason": "", "step": 4})
  assert [name for _, name in bucket_here.store.objects] == [
    "runs/one/run.json"
  ]
  saved = record_of(workdir).check()
  assert saved == run_record.read(workdir)
  assert saved["attempts"][0]["exit_code"] == 75


def test_a_bucket_that_does_not_answer_is_no_fault_of_a_setting(
  bucket_here, monkeypatch
):
  monkeypatch.setattr(objects, "PATIENCE_SECONDS", 0.1)
  bucket_here.store.set_faults(busy=1.0)
  with pytest.raises(OSError, match="does not answer"):
    record_of("gs://bucket/runs/one").check()


@pytest.mark.parametrize("content", [b"[]", b'{"essence": {}}'])
def test_all_processes_refuse_what_the_first_one_cannot_read(
  tmp_path, monkeypatch, content
):
  (tmp_path / "run.json").write_bytes(content)
  sent = []
  send = collectives.broadcast_string
  monkeypatch.setattr(
    collectives,
    "broadcast_string",
    lambda text: send(sent.append(text) or text),
  )
  with pytest.raises(SettingError) as first:
    run_record.read_together(tmp_path)
  # Another process is sent the same, and has no file to read.
  monkeypatch.setattr(collectives, "is_first_process", lambda: False)
  monkeypatch.setattr(collectives, "broadcast_string", lambda _: sent[0])
  with pytest.raises(SettingError) as other:
    run_record.read_together(tmp_path / "of no use")
  assert str(other.value) == str(first.value)
