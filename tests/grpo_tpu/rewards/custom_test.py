"""Users' rewards: a reward that fails excludes its own rows alone."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_pipelines import records
from grpo_tpu.config import defaults
from grpo_tpu.config.schema import Config
from grpo_tpu.rewards import scoring, settings
from tests.data_pipelines.workers.pool_test import await_end, is_alive
from tests.grpo_tpu.rewards import user_rewards

ROOT = pathlib.Path(__file__).resolve().parents[3]
HERE = "tests.grpo_tpu.rewards.user_rewards"
TEXTS = [f"I say {'very ' * i}little" for i in range(6)]
TRAPPED = TEXTS[:2] + ["Trap"] + TEXTS[2:] + ["A Trap"]
ROW_FAILS = [text in ("Trap", "A Trap") for text in TRAPPED]


def config_of(*names, **changes):
  fields = {
    "preset": "answer",
    "custom": tuple(f"{HERE}:{name}" for name in names),
    "custom_weights": (2.0,) * len(names),
    "num_workers": 0,
    "rows_per_call": 4,
    "timeout_seconds": 20.0,
    "max_error_fraction": 1.0,
    "error_window": 100,
  }
  config = Config.from_config_dict(defaults.get_config()).rewards
  return dataclasses.replace(config, **fields | changes)


def make_problem(index=0):
  return records.Problem(
    pid=f"p{index}",
    question="",
    images=(b"picture",),
    answer=str(index),
    question_type="free_form",
    answer_type="integer",
    metadata={"skills": ["arithmetic"]},
  )


def score(texts, config):
  return scoring.score(
    texts, [make_problem(i) for i in range(len(texts))], config
  )


@pytest.fixture(autouse=True)
def _closed():
  yield
  scoring.close()


@pytest.mark.parametrize(
  ("name", "num_workers", "reason"),
  [
    ("sleeping", 2, "longer than 1 seconds"),
    ("stuck", 2, "longer than 1 seconds"),
    ("dying", 2, "exit code 3"),
    ("leaving", 2, "SystemExit: 4"),
    ("leaving", 0, "SystemExit: 4"),
    ("raising", 2, "RuntimeError: out of order"),
    ("raising", 0, "RuntimeError: out of order"),
    ("unsendable", 2, "_Unsendable: strange"),
    ("nan", 2, "not nan"),
    ("nan", 0, "not nan"),
    ("infinite", 0, "finite float32"),
    ("text", 0, "finite float32, not 'much'"),
    ("digits", 0, "finite float32, not '1'"),
    ("digits", 2, "finite float32, not '1'"),
    ("none", 0, "finite float32, not None"),
    ("none", 2, "finite float32, not None"),
    ("huge", 2, "not an object of type int"),
    ("stubborn", 0, "not an object of type Stubborn"),
    ("nothing", 0, "TypeError: it must return a list"),
    ("coroutine", 0, "an object of type coroutine"),
    ("coroutine", 2, "an object of type coroutine"),
    ("string", 0, "an object of type str"),
    ("mapping", 2, "an object of type dict"),
    ("endless", 0, "too many rewards for 1 completions"),
    ("short", 2, "0 rewards for 1 completions"),
    ("short", 0, "0 rewards for 1 completions"),
    ("long", 0, "too many rewards for 1 completions"),
  ],
)
def test_a_reward_that_fails_excludes_its_row_alone_and_the_run_continues(
  name, num_workers, reason, caplog
):
  config = config_of(
    name,
    "brevity",
    num_workers=num_workers,
    timeout_seconds=1.0 if "longer" in reason else 20.0,
  )
  for _ in range(1 if "longer" in reason else 2):
    found = score(TRAPPED, config)
    np.testing.assert_array_equal(found.failed[name], ROW_FAILS)
    np.testing.assert_array_equal(found.valid, np.logical_not(ROW_FAILS))
    zeros = dict.fromkeys(settings.COMPONENTS, 0) | {"brevity": 0}
    assert found.errors == zeros | {name: 2}
    expected = np.float32(user_rewards.brevity(TRAPPED, None))
    np.testing.assert_array_equal(found.components["brevity"], expected)
    expected[ROW_FAILS] = 0
    np.testing.assert_array_equal(found.components[name], expected)
    np.testing.assert_array_equal(found.total, 4 * expected)
  assert reason in caplog.text


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_rows_reward_does_not_depend_on_workers_and_timing(num_workers):
  """Each row is scored with its own problem, in order."""
  texts = [str(i) for i in range(50)]
  names = ("of_problem", "brevity")
  plain = score(texts, config_of(*names))
  np.testing.assert_array_equal(plain.components["of_problem"], range(50))
  for rows_per_call in (1, 7):
    found = score(
      texts,
      config_of(*names, num_workers=num_workers, rows_per_call=rows_per_call),
    )
    assert list(found.components) == [*settings.COMPONENTS, *names]
    np.testing.assert_array_equal(found.total, plain.total)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_reward_is_called_with_whole_problems(num_workers):
  """Also with their pictures, and with text that UTF-8 cannot hold."""
  problem = dataclasses.replace(
    make_problem(2),
    images=(bytes(range(256)),),
    choices=("a", "b"),
    query="\ud800\r",
  )
  config = config_of("whole", num_workers=num_workers, rows_per_call=9)
  others = [make_problem(0), make_problem(1)]
  texts = [repr(each) for each in (problem, *others, problem)]
  found = scoring.score(texts, [problem, *others, problem], config)
  # The reward is the number of rows of its call, where all are as sent.
  np.testing.assert_array_equal(found.components["whole"], [4, 4, 4, 4])


@pytest.mark.parametrize("name", ["generated", "array", "scalars", "boolean"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_any_sequence_of_numbers_will_do(name, num_workers):
  found = score(TEXTS, config_of(name, num_workers=num_workers))
  expected = [1 / (1 + len(text)) for text in TEXTS]
  if name == "boolean":
    expected = [1] * len(TEXTS)
  np.testing.assert_allclose(found.components[name], expected, rtol=1e-3)


def test_workers_start_without_jax_and_tensorflow():
  found = score(TEXTS, config_of("is_light", num_workers=1))
  np.testing.assert_array_equal(found.components["is_light"], np.ones(6))


def test_scoring_imports_neither_jax_nor_tensorflow():
  code = (
    "import sys, grpo_tpu.rewards.scoring\n"
    "assert {'jax', 'tensorflow', 'multiprocessing.managers'}"
    ".isdisjoint(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_workers_import_from_this_processs_path(tmp_path, monkeypatch):
  (tmp_path / "found_here.py").write_text(
    "def one(completions, problems):\n  return [1.0] * len(completions)\n"
  )
  monkeypatch.syspath_prepend(tmp_path)
  config = config_of("brevity", num_workers=1)
  config = dataclasses.replace(config, custom=("found_here:one",))
  np.testing.assert_array_equal(score(TEXTS, config).total, [2.0] * 6)


def test_without_workers_a_reward_runs_in_this_process():
  found = score(TEXTS, config_of("process"))
  assert set(found.components["process"]) == {np.float32(os.getpid())}


def test_a_process_lives_until_it_hangs_and_all_end_when_closed(tmp_path):
  """Processes that a reward has started end with it."""
  config = config_of("announced", num_workers=1, timeout_seconds=1.0)
  config = dataclasses.replace(config, rows_per_call=1)
  first, again = (
    int(score(["x"], config).components["announced"][0]) for _ in range(2)
  )
  assert first == again != os.getpid()
  path = tmp_path / "pids"
  found = score([f"Trap {path}", "x"], config)
  assert found.valid.tolist() == [False, True]
  hung, child = map(int, path.read_text().split())
  assert hung == first
  await_end(hung)
  await_end(child)
  second = int(found.components["announced"][1])
  assert second != first and is_alive(second)
  scoring.close()
  assert not is_alive(second)


ORPHANING = """
import sys
from tests.grpo_tpu.rewards import custom_test
idle = custom_test.config_of("process", num_workers=1)
print(*custom_test.score(["x"], idle).components["process"], flush=True)
hangs = custom_test.config_of("announced", num_workers=1, timeout_seconds=2.0)
custom_test.score([f"Trap {sys.argv[1]}"], hangs)
"""


def test_no_process_outlives_a_trainer_that_is_killed(tmp_path):
  """Neither an idle worker nor one whose reward hangs."""
  path = tmp_path / "pids"
  trainer = subprocess.Popen(
    [sys.executable, "-c", ORPHANING, str(path)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert trainer.stdout is not None
  idle = int(float(trainer.stdout.readline()))
  while not path.exists():
    assert trainer.poll() is None
    time.sleep(0.01)
  hung = int(path.read_text().split()[0])
  assert is_alive(idle) and is_alive(hung)
  trainer.send_signal(signal.SIGKILL)
  trainer.wait()
  trainer.stdout.close()
  await_end(idle)
  await_end(hung)
  await_end(int(path.read_text().split()[1]))


def test_a_worker_that_cannot_start_ends_the_run(monkeypatch):
  config = config_of("brevity", num_workers=1)
  monkeypatch.setattr(sys, "path", [x for x in sys.path if "nowhere" in x])
  monkeypatch.chdir("/")
  with pytest.raises(RuntimeError, match="user_rewards.*cannot be started"):
    score(TEXTS, config)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_failure_too_many_ends_the_run(num_workers):
  """0.1 of 30 rows is 3; two rows of each batch of 8 fail."""
  config = config_of(
    "raising",
    num_workers=num_workers,
    max_error_fraction=0.1,
    error_window=30,
  )
  score(TRAPPED, config)
  score(TEXTS, config)
  with pytest.raises(
    scoring.RewardError,
    match=r"raising .*failed on 4 of the last 22 .*out of or",
  ):
    score(TRAPPED, config)


def test_failures_are_forgotten_after_the_window():
  """At most 2 of 10 rows: 8 rows with 2 failures, then 6 good ones, again."""
  config = config_of("raising", max_error_fraction=0.2, error_window=10)
  for _ in range(5):
    score(TRAPPED, config)
    score(TEXTS, config)


def test_failures_are_counted_per_reward():
  config = config_of(
    "raising", "nan", "short", max_error_fraction=0.2, error_window=10
  )
  assert sum(score(TRAPPED, config).errors.values()) == 6


@pytest.mark.parametrize(
  ("paths", "message"),
  [
    (["user_rewards.brevity"], "package.module:function"),
    ([f"{HERE}:brevity()"], "package.module:function"),
    (["tests.no_such:brevity"], "No module named 'tests.no_such'"),
    ([f"{HERE}:no_such"], "has no 'no_such'"),
    ([f"{HERE}:not_callable"], "has no 'not_callable' that can be called"),
    ([f"{HERE}:of_one"], "too many positional arguments"),
    *(
      ([f"{HERE}:{name}"], "must take `completion` and `problem`, one of each")
      for name in ("co", "judge", "judge_method", "partial_co", "partial_judge")
    ),
    ([f"{HERE}:co_generator"], "must return its reward, because it is async"),
    ([f"{HERE}:accuracy"], "give accuracy another name"),
    ([f"{HERE}:nan", f"{HERE}:nan"], "give nan another name"),
  ],
)
def test_a_reward_that_cannot_be_called_is_refused_by_name(paths, message):
  with pytest.raises(ValueError, match=r"^rewards.custom \('") as refused:
    config_of(custom=tuple(paths), custom_weights=(1.0,) * len(paths))
  assert message in str(refused.value)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("preset", "generous"),
    ("num_workers", -1),
    ("rows_per_call", 0),
    ("timeout_seconds", 0.0),
    ("timeout_seconds", float("inf")),
    ("max_error_fraction", 1.1),
    ("error_window", 0),
    ("custom_weights", (1.0, 2.0)),
    ("custom_weights", (float("nan"),)),
  ],
)
def test_a_setting_that_breaks_its_rule_is_named(name, value):
  with pytest.raises(ValueError, match=rf"^rewards.{name} \("):
    config_of("brevity", **{name: value})


def test_a_function_that_runs_an_async_one_is_a_reward():
  """What the error about async functions proposes is accepted and works."""
  found = score(TEXTS, config_of("awaited", num_workers=1))
  np.testing.assert_allclose(
    found.components["awaited"], user_rewards.brevity(TEXTS, None)
  )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_reward_that_fails_on_every_row_ends_the_run_at_once(num_workers):
  """Whatever is allowed; the error names the user's file and line."""
  config = config_of(
    "misspelt", num_workers=num_workers, max_error_fraction=1.0
  )
  with pytest.raises(
    scoring.RewardError,
    match=r"misspelt \(.*user_rewards.py:\d+\) failed on every one of the "
    r"last 6 completions; the first error, of problem p0: AttributeError: "
    r".*'anwser' \(.*user_rewards.py:\d+\)\. Fix",
  ) as raised:
    score(TEXTS, config)
  assert raised.value.scores.errors["misspelt"] == len(TEXTS)


def test_stand_ins_are_no_rows():
  """No user's reward sees them, and they hide no reward that always fails."""
  problems = [make_problem(i) for i in range(len(TRAPPED))]
  is_present = np.logical_not(ROW_FAILS)
  found = scoring.score(
    TRAPPED, problems, config_of("raising"), is_present=is_present
  )
  assert found.valid.all() and not any(found.errors.values())
  scoring.close()
  with pytest.raises(scoring.RewardError, match="every one of the last 2 "):
    scoring.score(
      TRAPPED, problems, config_of("raising"), is_present=np.array(ROW_FAILS)
    )


def test_no_reward_is_called_for_a_stand_in():
  """The reward is the number of rows of its call."""
  problems = [make_problem(i) for i in range(4)]
  found = scoring.score(
    list(map(repr, problems)),
    problems,
    config_of("whole"),
    is_present=np.array([True, False, False, True]),
  )
  np.testing.assert_array_equal(found.components["whole"], [2, 0, 0, 2])


def test_all_hosts_count_all_rows():
  """A reward that works on another host has not failed on every row."""

  def gather(rows):
    return np.concatenate([rows, np.array([[True] + [False] * 6])])

  config = config_of("misspelt")
  with pytest.raises(scoring.RewardError):
    scoring.reduce([scoring.start(["x"], [make_problem()], config)()], config)
  scoring.close()
  raw = scoring.start(["x"], [make_problem()], config)()
  assert scoring.reduce([raw], config, gather=gather).errors["misspelt"] == 1


def test_the_same_error_is_logged_once_with_its_count(caplog):
  config = config_of("raising")
  for _ in range(4):
    score(TRAPPED, config)
  logged = [x for x in caplog.messages if "out of order" in x]
  assert len(logged) == 1 and "failed on 2 completions" in logged[0]
  for _ in range(6):
    score(TRAPPED, config)
  logged = [x for x in caplog.messages if "out of order" in x]
  assert len(logged) == 2 and "failed on 10 completions" in logged[1]
