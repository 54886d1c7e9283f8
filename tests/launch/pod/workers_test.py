"""What a worker or a user may say is read, or refused in words."""

import shlex

import hypothesis
import pytest
from hypothesis import strategies as st

from launch.pod import exits, gcloud, workers
from tests.launch.pod import fake_cloud

NAMES = ("state", "exit_code", "stopped", "commit", "workdir", "step")


def test_a_status_ends_its_lines_as_the_worker_does():
  """Python also ends lines at U+0085 and U+2028, which a path may hold."""
  text = "state=running\ncommit=a\x85exit_code=0\u2028step=9\nstopped=1\n"
  status = workers.Status.parse(text)
  assert status.exit_code is None and status.step == -1
  assert status.commit == "a\x85exit_code=0\u2028step=9" and status.was_stopped


@pytest.mark.parametrize(
  "answer", ["state=evil\n", "step=1.5\n", "exit_code=x\n", "checkpoint=9e9\n"]
)
def test_a_foreign_status_is_a_failure_of_the_worker(answer):
  class Cloud:
    settings = fake_cloud.settings()

    def run_on_worker(self, worker, command):
      return answer

  with pytest.raises(exits.Failure, match="Worker 3 of grpo-1") as raised:
    workers.worker_status(Cloud(), 3)
  assert raised.value.exit == exits.Exit.WORKER_FAILED


@hypothesis.given(
  st.lists(
    st.builds(
      "{}={}\n".format,
      st.sampled_from(NAMES),
      st.text() | st.sampled_from(["ended", "running", "0", "-1", "1" * 5000]),
    )
  )
)
def test_any_status_is_read_or_refused(lines):
  try:
    assert str(workers.Status.parse("".join(lines)))
  except ValueError as error:
    assert str(error)


@pytest.mark.parametrize(
  "config",
  ["", ":lora", "--help", "--help.py", "/x.py", "../x.py", "configs", "x\n.py"],
)
def test_a_config_is_a_file_of_the_checkout(config):
  with pytest.raises(ValueError, match="CONFIG"):
    workers.Job(config, ())


@hypothesis.given(st.text(), st.lists(st.text()))
def test_any_command_is_taken_or_refused(config, flags):
  try:
    job = workers.Job(config, flags)
  except ValueError as error:
    assert str(error)
  else:
    assert job.words == [f"--config={config}", *flags]


def test_what_gcloud_and_workers_say_obeys_no_terminal():
  said = "\x1b]0;owned\x07 \x1b[2J right\rwrong \u202e"
  cloud = gcloud.Gcloud(fake_cloud.settings(), dry_run=False)
  with pytest.raises(exits.Failure) as raised:
    cloud.check_worker(0, 1, f"{said}\nand more")
  assert str(raised.value).replace("\n", "").isprintable()
  assert "and more" in str(raised.value)


@pytest.mark.parametrize("is_installed", [True, False])
def test_tensorboard_reads_a_bucket_from_here(
  tmp_path, monkeypatch, capfd, is_installed
):
  python = tmp_path / "a python"
  python.write_text(
    f"#!/bin/bash\nif [[ $1 == -c ]]; then exit {int(not is_installed)}; fi\n"
    'printf "%s\\n" "$@"\n'
  )
  python.chmod(0o755)
  monkeypatch.setenv("GRPO_TPU_PYTHON", str(python))
  cloud = gcloud.Gcloud(
    fake_cloud.settings(WORKDIR="gs://my-bucket/a run"), dry_run=False
  )
  workers.tensorboard(cloud, 7000)
  out = capfd.readouterr().out
  logdir = "--logdir=gs://my-bucket/a run"
  if is_installed:
    words = out.splitlines()
    assert words[:3] == ["-m", "tensorboard.main", logdir]
  else:
    words = shlex.split(out)
    assert words[:2] == ["tensorboard", logdir]
  assert "--port=7000" in words
