"""No mode takes random weights or drawn data for real ones unasked."""

import dataclasses
import json
import logging as python_logging

import pytest

from configs import base, gemma3_4b_v5e_16, smoke
from grpo_tpu.config import sources
from grpo_tpu.config.schema import Config

READING = ("evaluate", "export", "answer")
MODES = ("train", *READING)
SMOKE = Config.from_config_dict(smoke.get_config())
BIG = Config.from_config_dict(gemma3_4b_v5e_16.get_config())


def changed(config, **sections):
  parts = {
    name: dataclasses.replace(getattr(config, name), **values)
    for name, values in sections.items()
  }
  return dataclasses.replace(config, **parts)


def resolve(config, mode, workdir, *, flag=False):
  return sources.resolve(config, mode, str(workdir), lambda name: flag)


@pytest.fixture
def run(tmp_path):
  """A workdir with a run of the smoke config on data of its own."""

  def write(weights="run:START", name="tiny", folder="DATA", head="", **data):
    config = changed(SMOKE).to_dict()
    config["model"] |= {"weights": weights, "name": name, "head": head}
    config["data"] |= {"dir": folder} | data
    record = {"config": config, "weights": weights, "essence": {}}
    record |= {"accepted_changes": [], "attempts": [{}]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    return tmp_path

  return write


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_draws_weights_unasked(mode, tmp_path):
  config = Config.from_config_dict(base.get_config())
  with pytest.raises(ValueError, match="--workdir|model.weights") as caught:
    resolve(config, mode, tmp_path / "none")
  assert "model.weights=" in str(caught.value)
  assert not (tmp_path / "none").exists()


def test_a_released_model_gets_the_commands_for_weights_and_data(tmp_path):
  with pytest.raises(ValueError) as caught:
    resolve(BIG, "train", tmp_path)
  for words in (
    "model.weights ('') must name the parameters of gemma3_4b",
    "hf download google/gemma-3-4b-it --local-dir gemma-3-4b-it",
    "--config.model.weights=hf:gemma-3-4b-it",
    "random:SEED, which draws them, for tests",
    "data.dir ('') must name the data for gemma3_4b",
    "python -m data_pipelines.prepare --source=PATH",
  ):
    assert words in str(caught.value)
  assert "random:0" not in str(caught.value)


def test_a_text_model_is_offered_drawn_texts(tmp_path):
  model = {"name": "gemma3_270m", "weights": "random:0"}
  with pytest.raises(ValueError, match="--source=reasoning_gym:") as caught:
    resolve(changed(BIG, model=model), "train", tmp_path)
  assert "--source=synthetic" not in str(caught.value)


def test_a_plan_needs_neither_weights_nor_data(tmp_path):
  assert resolve(BIG, "plan", tmp_path) == BIG


def test_random_weights_of_a_released_model_are_taken_with_a_warning(
  tmp_path, caplog
):
  config = changed(BIG, model={"weights": "random:0"}, data={"dir": "DATA"})
  with caplog.at_level(python_logging.WARNING, "absl"):
    assert resolve(config, "train", tmp_path) == config
    assert resolve(SMOKE, "train", tmp_path) == SMOKE
  (message,) = caplog.messages
  assert "gemma3_4b at random: this model is noise" in message


@pytest.mark.parametrize("mode", READING)
def test_a_workdir_without_a_run_is_refused_unless_weights_are_named(
  mode, tmp_path
):
  folder = tmp_path / "typo"
  with pytest.raises(ValueError, match=rf"^--workdir \('{folder}'\) must hold"):
    resolve(SMOKE, mode, folder)
  assert not folder.exists()
  assert resolve(SMOKE, mode, folder, flag=True) == SMOKE
  named = changed(SMOKE, model={"weights": "run:OTHER"})
  assert resolve(named, mode, folder) == named


@pytest.mark.parametrize("mode", READING)
@pytest.mark.parametrize("named", ["", "random:0", "run:START"])
def test_a_run_in_the_workdir_is_read_at_its_newest_checkpoint(
  mode, named, run, caplog
):
  """Its own start, as in the command that trained it, names nothing else."""
  workdir = run()
  with caplog.at_level(python_logging.INFO, "absl"):
    config = resolve(changed(SMOKE, model={"weights": named}), mode, workdir)
  assert config.model.weights == f"run:{workdir}"
  assert f"model.weights=run:{workdir}" in caplog.text
  assert config.data.dir == "DATA"  # And no other drawn set.
  mine = resolve(changed(SMOKE, data={"dir": "MINE"}), mode, workdir)
  assert mine.data.dir == ("DATA" if mode == "answer" else "MINE")


def test_a_mixture_is_data_and_is_read_again(run, tmp_path):
  dirs = (("A", 0.7), ("B", 3.0))
  config = changed(BIG, model={"weights": "random:0"}, data={"dirs": dirs})
  assert resolve(config, "train", tmp_path) == config
  workdir = run(folder="", dirs=dirs)
  assert resolve(SMOKE, "evaluate", workdir).data.dirs == dirs
  own = resolve(changed(SMOKE, data={"dir": "MINE"}), "evaluate", workdir)
  assert (own.data.dir, own.data.dirs) == ("MINE", ())


@pytest.mark.parametrize(
  "dirs", ["A", {"A": 1}, [["A"]], [["A", "B"]], [[1, 2]], ["AB"], [[]], 3]
)
def test_data_dirs_that_no_run_has_are_refused(run, dirs):
  workdir = run(folder="", dirs=dirs)
  with pytest.raises(ValueError, match=r"run.json must be the record of a run"):
    resolve(SMOKE, "evaluate", workdir)


@pytest.mark.parametrize("mode", READING)
def test_weights_that_are_named_win_over_the_run(mode, run, caplog):
  workdir = run()
  named = changed(SMOKE, model={"weights": "run:OTHER"})
  assert resolve(named, mode, workdir) == named
  assert "model.weights ('run:OTHER'), which are not those of the run" in (
    caplog.text
  )
  assert resolve(SMOKE, mode, workdir, flag=True) == SMOKE


@pytest.mark.parametrize("mode", READING)
def test_the_run_of_another_model_is_refused(mode, run):
  workdir = run(name="gemma3_1b")
  with pytest.raises(
    ValueError, match=rf"^model.name \('tiny'\) .*{workdir}.*'gemma3_1b'"
  ):
    resolve(SMOKE, mode, workdir)


@pytest.mark.parametrize("mode", MODES)
def test_a_reward_model_is_exported_and_read_as_no_language_model(mode, run):
  """Neither that of the workdir nor one that is named, before devices start."""
  workdir = run(head="score")
  named = changed(SMOKE, model={"weights": f"run:{workdir}@7"})
  if mode == "export":
    assert resolve(SMOKE, mode, workdir).model.weights == f"run:{workdir}"
    assert resolve(named, mode, workdir.parent) == named
    return
  with pytest.raises(ValueError, match=r"^model.weights .*@7'.*reward model"):
    resolve(named, mode, workdir.parent)
  if mode != "train":
    with pytest.raises(ValueError, match=r"^model.head \(''\).*'score'"):
      resolve(SMOKE, mode, workdir)


def test_a_policy_is_refused_as_a_reward_model_before_data_are_drawn(tmp_path):
  config = changed(SMOKE, rewards={"models": (("random:1", 1.0),)})
  with pytest.raises(ValueError, match="no head that scores"):
    sources.fix_networks(config, str(tmp_path))
  assert not list(tmp_path.iterdir())


def test_a_step_that_was_not_saved_is_refused(run):
  config = changed(SMOKE, export={"step": "5"})
  workdir = run()
  with pytest.raises(ValueError, match=r"^export.step \('5'\) .*\(none\)"):
    resolve(config, "export", workdir)
  (workdir / "checkpoints" / "00000005").mkdir(parents=True)
  assert resolve(config, "export", workdir).model.weights == f"run:{workdir}@5"
  assert resolve(config, "evaluate", workdir).model.weights == f"run:{workdir}"


def test_a_question_is_asked_as_the_run_was_trained(run):
  """Unless a flag says otherwise; what is no prompt stays as it is set."""
  crops = {"enabled": True, "min_crop_size": 8, "max_num_crops": 2}
  crops["min_ratio_to_activate"] = 1.5
  workdir = run(
    system_prompt="Be brief.", prompt_template="boxed", few_shot=2,
    pan_and_scan=crops, prompts_per_step=32,
  )  # fmt: skip
  asked = changed(SMOKE, model={"weights": f"run:{workdir}@50"})
  mine = changed(
    asked, data={"system_prompt": "Mine."}, rollout={"temperature": 0.5}
  )
  flags = {"data.system_prompt"}
  for config, is_flag, system in (
    (asked, lambda name: False, "Be brief."),
    (mine, flags.__contains__, "Mine."),
  ):
    found = sources.as_trained(config, is_flag)
    assert found.data.system_prompt == system
    assert (found.data.prompt_template, found.data.few_shot) == ("boxed", 2)
    assert found.data.pan_and_scan.min_ratio_to_activate == 1.5
    assert (found.data.dir, found.rollout) == ("DATA", config.rollout)
    assert found.data.prompts_per_step == config.data.prompts_per_step
  assert sources.as_trained(SMOKE, flags.__contains__) == SMOKE


def test_a_question_needs_no_workdir_but_weights():
  named = changed(SMOKE, model={"weights": "run:OTHER"})
  assert resolve(named, "answer", "") == named
  with pytest.raises(ValueError, match=r"^--workdir \(''\) must hold a run"):
    resolve(SMOKE, "answer", "")


@pytest.mark.parametrize("mode", READING)
def test_the_best_step_is_that_of_the_run_and_its_data(mode, run, caplog):
  workdir = run()
  best = f"run:{workdir}@best"
  config = resolve(changed(SMOKE, model={"weights": best}), mode, workdir)
  assert (config.model.weights, config.data.dir) == (best, "DATA")
  assert "not those of the run" not in caplog.text
  config = changed(SMOKE, export={"step": "best"})
  assert resolve(config, "export", workdir).model.weights == best
