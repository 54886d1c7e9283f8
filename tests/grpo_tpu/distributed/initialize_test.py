"""The address of a run, and the facts that its processes must agree on."""

import dataclasses
import types

import pytest

from grpo_tpu.distributed import fingerprint, initialize, preflight
from grpo_tpu.distributed.settings import DistributedConfig

TIMEOUTS = DistributedConfig(300, 60, 60, 120, 1800.0, 3600.0)


def test_flags_precede_the_environment_and_neither_means_one_process(
  monkeypatch,
):
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
  ("given", "message"),
  [
    (("a:1", None, 0), "--num_processes (None) must be given"),
    ((None, 2, 0), "--coordinator_address (None) must be given"),
    (("a", 2, 0), "must be HOST:PORT"),
    (("a:x", 2, 0), "must be HOST:PORT"),
    (("a:1", 2, 2), "--process_id (2) must be at least 0 and below"),
    (("a:1", 2, -1), "--process_id (-1) must be"),
  ],
)
def test_an_incomplete_address_is_refused(monkeypatch, given, message):
  for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"):
    monkeypatch.delenv(f"JAX_{name}", raising=False)
  with pytest.raises(ValueError) as error:
    initialize.read_process_address(*given)
  assert message in str(error.value)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("heartbeat_timeout_seconds", 0),
    ("watchdog_seconds", -1.0),
    ("watchdog_start_seconds", 1.0),
    ("watchdog_seconds", float("inf")),
  ],
)
def test_an_invalid_time_limit_is_named(name, value):
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
        "digests": {k: fingerprint.digest(v) for k, v in facts.items()},
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
  before = fingerprint.code_hashes(tmp_path)
  file.write_text("a = 2\n")
  after = fingerprint.code_hashes(tmp_path)
  assert set(before) == set(after) == {"grpo_tpu/x.py"} and before != after


@pytest.mark.parametrize(
  ("named", "chips", "has_libtpu", "platform"),
  [
    ("", [], True, "cpu"),
    ("", ["/dev/accel0"], True, ""),
    ("", [], False, ""),
    ("tpu,cpu", [], True, "tpu,cpu"),
  ],
  ids=["no chip", "a chip", "no libtpu", "chosen by the user"],
)
def test_jax_uses_the_cpu_if_no_chip_is_there(
  monkeypatch, named, chips, has_libtpu, platform
):
  """Libtpu prints errors there; a user who chose a platform must see them."""
  settings = {"jax_platforms": named}
  monkeypatch.setattr(
    initialize.jax,
    "config",
    types.SimpleNamespace(update=settings.__setitem__, jax_platforms=named),
  )
  monkeypatch.setattr(initialize.tpu_host, "find_chips", lambda: chips)
  monkeypatch.setattr(
    initialize.importlib.util, "find_spec", lambda _: has_libtpu
  )
  initialize._choose_platform()
  assert settings["jax_platforms"] == platform


@pytest.mark.parametrize(
  ("variables", "asks_jax"),
  [
    ({"TPU_PROCESS_ADDRESSES": "local"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({}, True),
  ],
  ids=["a notebook's only host", "two hosts", "a TPU VM"],
)
def test_a_tpu_host_that_is_alone_needs_no_metadata(
  monkeypatch, variables, asks_jax
):
  """JAX would wait five minutes for a host named "local"."""
  calls = []
  for name in ("PROCESS_ADDRESSES", "WORKER_HOSTNAMES", "SKIP_MDS_QUERY"):
    monkeypatch.delenv(f"TPU_{name}", raising=False)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(initialize, "_has_tpu", lambda: True)
  monkeypatch.setattr(initialize, "_choose_platform", lambda: None)
  monkeypatch.setattr(
    initialize.jax.distributed,
    "initialize",
    lambda *a, **k: calls.append((a, k)),
  )
  initialize.initialize(TIMEOUTS, None)
  ((address, options),) = calls
  if asks_jax:
    assert address == () and "cluster_detection_method" not in options
  else:
    host, *place = address
    assert host.startswith("127.0.0.1:") and place == [1, 0]
    assert options["cluster_detection_method"] == "deactivate"
