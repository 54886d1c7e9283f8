"""The workflows run the project's scripts and trust only what is pinned."""

import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").iterdir())
SCRIPTS = ("launch/test.sh", "launch/site.sh")

pytestmark = pytest.mark.parametrize(
  "path", WORKFLOWS, ids=lambda path: path.stem
)


def jobs_of(path: pathlib.Path) -> list[dict]:
  return list(yaml.safe_load(path.read_text())["jobs"].values())


def steps_of(path: pathlib.Path) -> list[dict]:
  return [step for job in jobs_of(path) for step in job["steps"]]


def test_every_action_is_pinned_by_a_commit_with_its_version(path):
  lines = re.findall(r"^.*\buses:.*$", path.read_text(), re.MULTILINE)
  assert lines
  for line in lines:
    assert re.search(r"uses: [\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line)


def test_every_command_is_a_script_of_the_project(path):
  commands = [step["run"] for step in steps_of(path) if "run" in step]
  assert commands
  for command in commands:
    bash, script, *arguments = command.split(" ")
    assert bash == "bash" and script in SCRIPTS
    assert all((ROOT / argument).exists() for argument in arguments)


def test_a_workflow_may_only_read_unless_a_job_asks_for_more(path):
  workflow = yaml.safe_load(path.read_text())
  assert workflow["permissions"] == {"contents": "read"}
  granted = [
    job["permissions"] for job in jobs_of(path) if "permissions" in job
  ]
  assert granted in ([], [{"pages": "write", "id-token": "write"}])
  for step in steps_of(path):
    if step.get("uses", "").startswith("actions/checkout@"):
      assert step["with"]["persist-credentials"] is False


def test_every_job_has_a_time_limit_and_old_runs_are_cancelled(path):
  assert yaml.safe_load(path.read_text())["concurrency"]["cancel-in-progress"]
  assert all(job["timeout-minutes"] <= 90 for job in jobs_of(path))
