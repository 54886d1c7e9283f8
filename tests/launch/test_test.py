"""The checks run in order, and the first failure ends the script."""

import pytest

TEST = 'bash "../a checkout/launch/test.sh" "$@"'
TOOLS = ("ruff", "pyright", "shellcheck")


@pytest.fixture
def machine(checkout):
  """A complete venv, with fake tools that record their calls."""
  checkout.add_python(checkout.path / "python3.12")
  assert checkout.run(TEST, "--version").returncode == 0
  checkout.called()
  for tool in TOOLS:
    checkout.add_python(checkout.root / ".venv" / "bin" / tool)
  return checkout


def test_without_arguments_every_check_runs(machine):
  assert machine.run(TEST).returncode == 0
  calls = machine.called()
  assert [call[0] for call in calls] == [
    "format",
    "check",
    "--pythonpath",
    "--external-sources",
    "-m",
  ]
  assert calls[-1][:4] == ["-m", "pytest", "-m", "not tpu and not nightly"]
  assert all(word.startswith("--") for word in calls[-1][4:])
  for script in ("launch/setup.sh", "launch/smoke.sh", "launch/test.sh"):
    assert script in calls[-2]


@pytest.mark.parametrize(
  "word, ran",
  [("format", 1), ("check", 2), ("--pythonpath", 3), ("pytest", 5)],
)
def test_the_first_check_that_fails_gives_the_exit_code(machine, word, ran):
  machine.environment["EXITS"] = f"{word}=5"
  assert machine.run(TEST).returncode == 5
  assert len(machine.called()) == ran


def test_arguments_are_for_pytest_which_then_runs_alone(machine):
  assert machine.run(TEST, "-k", "a b").returncode == 0
  assert machine.called() == [
    ["-m", "pytest", "-m", "not tpu and not nightly", "-k", "a b"]
  ]
