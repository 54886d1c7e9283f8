"""Where a process joins, and what all of them must agree on."""

import dataclasses
import types

import pytest

from grpo_tpu.distributed import initialize, preflight
from grpo_tpu.distributed.settings import DistributedConfig

TIMEOUTS = DistributedConfig(300, 60, 60, 120, 1800.0, 3600.0)


def test_flags_come_before_the_environment_and_nothing_means_alone(monkeypatch):
  for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
    monkeypatch.delenv(f"JAX_{name}", raising=False)
  assert initialize.read_process_address(None, None, None) is None
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
  monkeypatch.setenv("JAX_PROCESS_ID", "3")
  assert initialize.read_process_address(
    None, None, None
  ) == initialize.ProcessAddress("a:1", 4, 3)
  assert initialize.read_process_address(
    "b:2", None, 0
  ) == initialize.ProcessAddress("b:2", 4, 0)


@pytest.mark.parametrize(
  ("given", "said"),
  [
    (("a:1", None, 0), "--num_processes (None) must be given"),
    ((None, 2, 0), "--coordinator_address (None) must be given"),
    (("a", 2, 0), "must be HOST:PORT"),
    (("a:x", 2, 0), "must be HOST:PORT"),
    (("a:1", 2, 2), "--process_id (2) must be at least 0 and below"),
    (("a:1", 2, -1), "--process_id (-1) must be"),
  ],
)
def test_half_an_address_is_refused(monkeypatch, given, said):
  for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
    monkeypatch.delenv(f"JAX_{name}", raising=False)
  with pytest.raises(ValueError) as error:
    initialize.read_process_address(*given)
  assert said in str(error.value)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("heartbeat_timeout_seconds", 0),
    ("watchdog_seconds", -1.0),
    ("watchdog_start_seconds", 1.0),
    ("watchdog_seconds", float("inf")),
  ],
)
def test_a_time_out_that_cannot_be_is_named(name, value):
  with pytest.raises(ValueError, match=name):
    dataclasses.replace(TIMEOUTS, **{name: value})
  dataclasses.replace(TIMEOUTS, watchdog_seconds=0.0)


def said_by(monkeypatch, *hosts):
  """What `check` raises where these hosts say these facts."""

  def exchange_json(topic, value, *, timeout_seconds):
    if topic.endswith("details"):
      return list(hosts)
    return [
      {
        "name": f"h{index}",
        "digests": {k: preflight._digest(v) for k, v in facts.items()},
      }
      for index, facts in enumerate(hosts)
    ]

  monkeypatch.setattr(initialize, "exchange_json", exchange_json)
  preflight.check("x", hosts[0], timeout_seconds=1)


def test_the_host_that_differs_is_named_with_what_differs(monkeypatch):
  same = {"config": {"seed": 0, "objective.beta": 0.0}, "code": {"a.py": "1"}}
  said_by(monkeypatch, same, same, same)
  other = same | {"config": {"seed": 0, "objective.beta": 0.1}}
  with pytest.raises(ValueError) as error:
    said_by(monkeypatch, same, same, other)
  words = str(error.value)
  assert "host 2 (h2): config objective.beta is 0.1, host 0 has 0.0" in words
  assert "host 1" not in words and "seed" not in words
  without = same | {"code": {}}
  with pytest.raises(ValueError, match="code a.py is nothing, host 0 has 1"):
    said_by(monkeypatch, same, without)


def test_a_changed_file_of_ours_is_seen_and_named(tmp_path):
  """Whatever git knows of it."""
  (tmp_path / "grpo_tpu").mkdir()
  file = tmp_path / "grpo_tpu" / "x.py"
  file.write_text("a = 1\n")
  before = preflight.code(tmp_path)
  file.write_text("a = 2\n")
  after = preflight.code(tmp_path)
  assert set(before) == set(after) == {"grpo_tpu/x.py"} and before != after


@pytest.mark.parametrize(
  ("named", "chips", "has_libtpu", "settled"),
  [
    ("", [], True, "cpu"),
    ("", ["/dev/accel0"], True, ""),
    ("", [], False, ""),
    ("tpu,cpu", [], True, "tpu,cpu"),
  ],
  ids=["no chip", "a chip", "nothing looks for chips", "named by the user"],
)
def test_libtpu_is_not_asked_where_no_chip_is(
  monkeypatch, named, chips, has_libtpu, settled
):
  """It prints errors there, and a user who named a platform is to see them."""
  told = {"jax_platforms": named}
  monkeypatch.setattr(
    initialize.jax,
    "config",
    types.SimpleNamespace(update=told.__setitem__, jax_platforms=named),
  )
  monkeypatch.setattr(
    initialize.glob,
    "glob",
    lambda pattern: chips if "accel" in pattern else [],
  )
  monkeypatch.setattr(
    initialize.importlib.util, "find_spec", lambda _: has_libtpu
  )
  initialize._choose_platform()
  assert told["jax_platforms"] == settled
