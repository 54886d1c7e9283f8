"""Each failure has its own exit code and a next step."""

import pathlib
import re
import shutil
import tomllib

import pytest

from launch.pod import exits, gcloud
from tests.launch.pod import fake_cloud

Exit = exits.Exit
CONFIG = "configs/my config.py"

real = fake_cloud.needs_gcloud
OURS = {
  "labels": {"grpo-tpu": "grpo-1"},
  "acceleratorType": "v5litepod-16",
}
QUOTA = (
  429,
  "RESOURCE_EXHAUSTED",
  "Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been"
  " exceeded. Limit: 16 in zone europe-west4-b.",
)
NO_CAPACITY = (
  429,
  "RESOURCE_EXHAUSTED",
  "There is no more capacity in the zone europe-west4-b; try another.",
)
NOT_ALLOWED = (
  403,
  "PERMISSION_DENIED",
  "Permission 'tpu.nodes.create' denied on resource.",
)


def fails(laptop, kind: Exit, *words: str) -> str:
  """Runs a verb that fails with this code; returns its error output."""
  done = laptop.tpu(*words)
  assert done.returncode == kind, done.stderr
  assert (
    f"Exit code {kind.value} ({kind.name}). Next: {kind.next_step}"
    in done.stderr
  )
  assert laptop.token not in done.stdout + done.stderr
  return done.stderr


@real
@pytest.mark.parametrize(
  "request_by, refusal, kind",
  [
    ("queued", QUOTA, Exit.QUOTA),
    ("direct", NO_CAPACITY, Exit.NO_CAPACITY),
    ("direct", NOT_ALLOWED, Exit.NOT_ALLOWED),
  ],
)
def test_a_slice_that_is_refused(laptop, cloud, request_by, refusal, kind):
  laptop.settings["REQUEST"] = request_by
  cloud.refusal = refusal
  assert refusal[2][:30] in fails(laptop, kind, "create")


@real
@pytest.mark.parametrize(
  "state, kind",
  [
    ("FAILED", Exit.FAILED),
    ("SUSPENDED", Exit.SUSPENDED),
    ("WAITING_FOR_RESOURCES", Exit.TIMEOUT),
  ],
)
def test_a_slice_that_never_becomes_ready(laptop, cloud, state, kind):
  cloud.queued["grpo-1"] = {"tpu": {"nodeSpec": [{"node": OURS}]}, "looks": 0}
  cloud.requested_states = [state]
  said = fails(laptop, kind, "wait", "--timeout=0.1", "--poll=0.1")
  assert state in said
  assert (cloud.failure in said) == (state == "FAILED")


@real
@pytest.mark.parametrize(
  "labels", [{}, {"grpo-tpu": "another"}], ids=["none", "of another"]
)
def test_slices_without_our_label_are_never_deleted(laptop, cloud, labels):
  cloud.queued["grpo-1"] = {
    "tpu": {"nodeSpec": [{"node": OURS | {"labels": labels}}]},
    "looks": 0,
  }
  fails(laptop, Exit.NOT_OURS, "delete")
  assert cloud.requests == [] and "grpo-1" in cloud.queued
  if not labels:
    fails(laptop, Exit.NOT_OURS, "create")
    assert cloud.requests == []


@real
def test_a_slice_that_does_not_exist(laptop):
  fails(laptop, Exit.ABSENT, "run", CONFIG)


@real
def test_a_slice_that_was_taken_away_is_not_worked_on(laptop, cloud):
  cloud.add_node("grpo-1", OURS)["state"] = "PREEMPTED"
  assert "PREEMPTED" in fails(laptop, Exit.PREEMPTED, "status")


@real
@pytest.mark.nightly  # gcloud tries for most of a minute.
def test_one_worker_that_ssh_does_not_reach_is_named(laptop, cloud, tmp_path):
  laptop.settings["WORKDIR"] = str(tmp_path / "a workdir")
  cloud.add_node("grpo-1", OURS)
  assert laptop.tpu("setup").returncode == 0
  cloud.worker(1).with_name(cloud.worker(1).name + ".cut").touch()
  said = fails(laptop, Exit.WORKER_UNREACHABLE, "run", CONFIG)
  assert "Worker 1 of grpo-1 could not be reached" in said
  assert "Worker 0" not in said


@real
@pytest.mark.nightly  # gcloud tries for half a minute.
def test_a_network_that_is_lost(laptop):
  url = "http://127.0.0.1:9/"
  laptop.environment["CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU"] = url
  fails(laptop, Exit.NETWORK, "status")


@real
def test_a_run_is_not_started_twice_and_ends_by_stop_having_saved(
  laptop, cloud, tmp_path
):
  workdir = tmp_path / "a workdir"
  laptop.settings["WORKDIR"] = str(workdir)
  cloud.num_workers = 1
  cloud.add_node("grpo-1", OURS)
  fails(laptop, Exit.NOT_SET_UP, "run", CONFIG)
  assert laptop.tpu("setup").returncode == 0
  assert laptop.tpu("run", CONFIG).returncode == 0
  fails(laptop, Exit.BUSY, "run", CONFIG)
  fails(laptop, Exit.BUSY, "setup")
  stopped = laptop.tpu("stop")
  assert stopped.returncode == 0, stopped.stderr
  assert (workdir / "checkpoints" / "00000000").exists()
  assert "ended with exit code 75" in laptop.tpu("status").stdout
  assert "resumes from step 0" in laptop.tpu("logs").stdout


def test_without_gcloud_the_code_says_so(laptop, tmp_path):
  tools = tmp_path / "tools"
  tools.mkdir()
  for name in ("bash", "dirname", "git"):
    (tools / name).symlink_to(shutil.which(name) or "")
  laptop.environment["PATH"] = str(tools)
  fails(laptop, Exit.NO_GCLOUD, "status")


@pytest.mark.parametrize(
  "words",
  [
    ("run", "configs/none.py"),
    ("run", "/etc/passwd"),
    ("run", "../configs/smoke.py"),
    ("run", "configs/a\nb.py"),
    ("run", CONFIG, "--", "--workdir=/tmp"),
    ("run", CONFIG, "--", "--config=configs/smoke.py"),
    ("run", CONFIG, "--", "seed"),
    ("run",),
    ("walk",),
    (),
    ("wait", "--timeout=-1"),
    ("wait", "--poll=nan"),
    ("logs", "-w", "x"),
    ("tensorboard", "--port=0"),
    ("tensorboard", "--port=99999"),
    ("create", "--nam=x"),
    ("jobset", CONFIG),
  ],
)
def test_a_bad_request_calls_no_api(laptop, cloud, words):
  done = laptop.tpu(*words)
  assert done.returncode == Exit.BAD_REQUEST
  assert done.stderr and cloud.requests == []


def test_a_wrong_setting_is_refused_before_any_call(laptop, cloud):
  laptop.settings["NAME"] = "$(touch owned)"
  said = fails(laptop, Exit.BAD_REQUEST, "create")
  assert "NAME ('$(touch owned)') must be" in said
  assert list(laptop.home.iterdir()) == []


def test_an_uncommitted_config_is_not_sent(laptop):
  (laptop.checkout / "configs" / "new.py").write_text("")
  said = fails(laptop, Exit.BAD_REQUEST, "run", "configs/new.py")
  assert "commit it" in said


@real
def test_supervise_that_ends_says_how_to_stop_paying(laptop, cloud, tmp_path):
  """The slice is still there, whether the run or the launcher failed."""
  laptop.settings["WORKDIR"] = str(tmp_path / "a workdir")
  cloud.add_node("grpo-1", OURS)
  cloud.tell("end", Exit.BAD_REQUEST)
  done = laptop.tpu("supervise", "--poll=0.1", CONFIG)
  assert done.returncode == Exit.BAD_REQUEST
  words = (
    "grpo-1 exists, it costs money until you delete it: bash launch/tpu.sh"
  )
  assert f"If {words} delete\n" in done.stderr
  assert "`status` and `logs` say what the program refused." in done.stderr
  assert "grpo-1" in cloud.nodes

  cloud.nodes["grpo-1"]["labels"] = {}
  cloud.nodes["grpo-1"]["state"] = "PREEMPTED"
  assert words in fails(laptop, Exit.NOT_OURS, "supervise", CONFIG)


ERRORS = tomllib.loads(
  pathlib.Path(__file__).with_name("gcloud_errors.toml").read_text()
)


@pytest.mark.parametrize(
  "words, kind",
  [(words, kind) for kind, errors in ERRORS.items() for words in errors],
)
def test_errors_of_gcloud_are_classified(words, kind):
  assert gcloud.classify_error(words).name == kind


def test_every_exit_code_is_unique_and_has_a_next_step():
  kinds = set(Exit) - {Exit.DONE}
  assert all(kind.next_step for kind in kinds)
  # `supervise` also ends with these codes of the program.
  assert {kind.value for kind in kinds} & {0, 1, 75, 76, 134} == set()


@pytest.mark.parametrize(
  "returncode, stderr, kind",
  [
    (255, "ssh: connect to host", Exit.WORKER_UNREACHABLE),
    (
      1,
      "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with"
      " return code [255].",
      Exit.WORKER_UNREACHABLE,
    ),
    (1, "ERROR: (gcloud.x) NOT_FOUND: it", Exit.ABSENT),
    (1, "pip said no", Exit.WORKER_FAILED),
    (92, "A run exists on this worker.", Exit.BUSY),
    (7, "", Exit.WORKER_FAILED),
    (127, "bash: grpo_tpu_worker.sh: No such file", Exit.NOT_SET_UP),
  ],
)
def test_errors_of_a_worker_are_classified(returncode, stderr, kind):
  cloud = gcloud.Gcloud(fake_cloud.settings(), dry_run=False)
  with pytest.raises(exits.Failure) as raised:
    cloud.check_worker(3, returncode, stderr)
  assert raised.value.exit == kind


def test_the_guide_has_every_exit_code_by_number_and_name():
  guide = (fake_cloud.ROOT / "docs" / "on-a-pod.md").read_text()
  rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", guide, re.MULTILINE)
  assert rows == [(str(kind.value), kind.name) for kind in sorted(Exit)]


def test_the_guide_has_every_setting_and_every_verb():
  guide = (fake_cloud.ROOT / "docs" / "on-a-pod.md").read_text()
  _, table = guide.split("## Settings")
  named = set(re.findall(r"\b[A-Z]{3,}(?:_[A-Z]+)*\b", table.split("## ")[0]))
  assert set(fake_cloud.SETTINGS) <= named
  script = (fake_cloud.ROOT / "launch" / "tpu.sh").read_text()
  for verb in re.findall(r"^\| `([a-z]+)", guide, re.MULTILINE):
    assert verb in script
