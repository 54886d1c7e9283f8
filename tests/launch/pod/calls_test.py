"""gcloud's own parser accepts every call."""

import itertools
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from random import Random

import pytest

from launch.pod import __main__ as command_line
from launch.pod import check, readiness, workers
from launch.pod.exits import Exit
from tests.launch.pod import fake_cloud

CONFIG = "configs/smoke.py"
VERBS = (
  ("check", CONFIG, "--", "--config.data.dir=gs://my-bucket/data"),
  ("create",),
  ("wait",),
  ("setup",),
  ("run", CONFIG, "--", "--config.seed=1"),
  ("logs",),
  ("logs", "-w", "1", "-f"),
  ("status",),
  ("stop", "--kill"),
  ("supervise", CONFIG),
  ("supervise", "--on-vm", CONFIG),
  ("tensorboard", "--port=6007"),
  ("delete",),
)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
  """The checks have tests of their own."""
  monkeypatch.setattr(check, "check", lambda settings, job: None)
  monkeypatch.setattr(workers, "count_unsent", lambda settings: 0)
  monkeypatch.setattr(check, "check_memory", lambda settings, job: ("ok", ""))


@pytest.fixture
def settings_file(tmp_path):
  def write(**changes: str) -> str:
    values = fake_cloud.SETTINGS | changes
    path = tmp_path / "my settings.env"
    path.write_text("".join(f"{k}={v}\n" for k, v in values.items()))
    return f"--settings={path}"

  return write


def dry_run(capfd, settings: str, *words: str) -> list[list[str]]:
  """The calls that a verb prints, without the word gcloud."""
  capfd.readouterr()
  code = command_line.main([settings, "--dry-run", *words])
  out, err = capfd.readouterr()
  assert code == 0, err
  calls = [shlex.split(line) for line in out.splitlines()]
  return [call[1:] for call in calls if call[0] == "gcloud"]


def all_calls(capfd, settings_file) -> list[list[str]]:
  """The calls of all verbs, with each REQUEST, CAPACITY and SSH."""
  ways = itertools.product(
    ("queued", "direct"),
    ("spot", "on-demand", "reserved"),
    ("external", "internal", "iap"),
    ("", "a-registry/an-image"),
  )
  calls = []
  for request, capacity, ssh, image in ways:
    if image and (request, capacity) != ("queued", "spot"):
      continue
    account = "a@my-project.iam.gserviceaccount.com"
    changes = {"REQUEST": request, "CAPACITY": capacity, "SSH": ssh}
    changes |= {"SUBNETWORK": "inner", "SERVICE_ACCOUNT": account}
    changes |= {"LABELS": "team=vision", "IMAGE": image}
    settings = settings_file(**changes)
    for words in VERBS:
      calls.extend(dry_run(capfd, settings, *words))
  return [list(call) for call in dict.fromkeys(map(tuple, calls))]


@pytest.fixture
def parse(tmp_path):
  """Parses calls with gcloud's own parser."""
  gcloud = pathlib.Path(shutil.which("gcloud") or "").resolve()
  sdk = gcloud.parents[1]
  bundled = sdk / "platform" / "bundledpythonunix" / "bin" / "python3"
  python = bundled if bundled.exists() else sys.executable
  script = pathlib.Path(fake_cloud.__file__).with_name("gcloud_parser.py")

  def parsed(calls: list[list[str]]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
      [str(python), "-S", "-W", "ignore", str(script), str(sdk)],
      input=json.dumps(calls),
      capture_output=True,
      text=True,
      env={"CLOUDSDK_CONFIG": str(tmp_path), "HOME": str(tmp_path)},
    )

  return parsed


real = pytest.mark.skipif(
  not shutil.which("gcloud"), reason="no gcloud on PATH"
)


def calls_of_the_guide() -> list[list[str]]:
  """The calls in the guide, and those that `check` proposes."""
  text = (fake_cloud.ROOT / "docs" / "on-a-pod.md").read_text()
  text = text.replace("\\\n", " ")
  blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
  lines = re.findall(r"^gcloud (.*)$", "\n".join(blocks), re.MULTILINE)
  lines += re.findall(r"`gcloud (\S+ [^`]+)`", text)
  for item in readiness._TABLE["item"]:
    remedy = re.sub(r"\{[a-z_]+\}", "europe-west4-b", item["remedy"])
    lines += [x.strip().removeprefix("gcloud ") for x in remedy.split("&&")]
  return [shlex.split(line, comments=True) for line in lines]


@real
def test_gcloud_accepts_every_flag_of_every_call(capfd, settings_file, parse):
  calls = all_calls(capfd, settings_file)
  guide = calls_of_the_guide()
  assert len(guide) > 15 and ["auth", "login"] in guide
  calls += guide
  parsed = parse(calls)
  assert parsed.returncode == 0, parsed.stderr
  flags = {f for line in parsed.stdout.splitlines() for f in json.loads(line)}
  assert len(parsed.stdout.splitlines()) == len(calls) > 40
  assert {
    *("--spot", "--reserved", "--internal-ips", "--valid-until-duration"),
    *("--labels", "--service-account", "--tunnel-through-iap", "--force"),
  } <= flags
  wrong = parse([[*calls[0], "--nope"]])
  assert wrong.returncode == 2 and "--nope" in wrong.stderr


KEY = "projects/p/locations/global/keyRings/r/cryptoKeys/k"
# Settings, and the flags that they add to a creation.
FLAGS = (
  (
    {"CAPACITY": "flex-start", "MAX_RUN_DURATION": "2d"},
    ["--provisioning-model=flex-start", "--max-run-duration=2d"],
  ),
  ({"CAPACITY": "reserved", "RESERVATION": "mine"}, ["--reservation=mine"]),
  ({"NUM_SLICES": "2"}, ["--node-count=2"]),
  ({"NETWORK_TAGS": "a,b-c"}, ["--tags=a,b-c"]),
  (
    {"AUTOCHECKPOINT": "yes"},
    ["--autocheckpoint-enabled", "--provisioning-model=spot", "--spot"],
  ),
  (
    {"AUTOCHECKPOINT": "yes", "CAPACITY": "on-demand"},
    ["--autocheckpoint-enabled"],
  ),
  (
    {"BOOT_DISK": f"confidential-compute=true,kms-key={KEY}"},
    [f"--boot-disk=confidential-compute=true,kms-key={KEY}"],
  ),
)


@real
def test_gcloud_accepts_the_flags_of_each_setting(capfd, settings_file, parse):
  calls = []
  for changes, flags in FLAGS:
    for request in ("queued", "direct"):
      if request == "direct" and {"NUM_SLICES", "MAX_RUN_DURATION"} & {
        *changes
      }:
        continue
      file = settings_file(**changes | {"REQUEST": request})
      (create,) = [x for x in dry_run(capfd, file, "create") if "create" in x]
      assert set(flags) <= set(create)
      assert "--reserved" not in create  # Which would take any reservation.
      calls.append(create)
  parsed = parse(calls)
  assert parsed.returncode == 0, parsed.stderr


WORDS = (
  *("create", "run", "supervise", "logs", "status", "jobset", "tensorboard"),
  *(CONFIG, "configs/smoke.py:x", "", "--", "-", "--help", "--dry-run", "-n"),
  *("--lines=1e9", "--poll=nan", "--timeout=-1", "--port=65536", "-w", "9"),
  *("--config.a=1", "--workdir=x", "a b", "\x1b[2J\r", "\udc80", "1" * 5000),
  *("--settings=", "--settings=/", "--settings=\udc80", "--no-check", "\x85"),
)


def test_any_command_line_is_run_or_refused_in_words(capfd, settings_file):
  random = Random(0)
  file, codes = settings_file(IMAGE="an-image"), set(map(int, Exit))
  for _ in range(400):
    words = random.choices(WORDS, k=random.randint(0, 5))
    try:
      code = command_line.main([file, "--dry-run", *words])
    except SystemExit as end:
      code = end.code
    assert code in codes, words
  out, err = capfd.readouterr()
  assert "\x1b" not in out + err and "\x85" not in out + err
  assert "Traceback" not in err


def test_a_dry_run_says_that_it_assumes(capfd, settings_file):
  for words in (("delete",), ("supervise", CONFIG), ("status",)):
    command_line.main([settings_file(), "--dry-run", *words])
    out, err = capfd.readouterr()
    lines = [x for x in (out + err).splitlines() if not x.startswith("gcloud ")]
    assert lines
    assert all(line.startswith("(dry run) ") for line in lines), lines


def test_each_verb_names_the_slice_its_project_and_its_zone(
  capfd, settings_file
):
  for words in VERBS[1:]:  # `check` asks for more than slices.
    for call in dry_run(capfd, settings_file(), *words):
      assert {"--project=my-project", "--quiet"} < set(call)
      if call[0] != "storage":
        names = {word.partition(":")[0] for word in call}
        assert names & {"grpo-1", "grpo-1-supervisor"}
        assert "--zone=europe-west4-b" in call


def test_a_dry_run_calls_the_same_on_every_worker(capfd, settings_file):
  calls = dry_run(capfd, settings_file(), "run", CONFIG)
  calls = [call for call in calls if "ssh" in call]
  assert [call[5] for call in calls] == [f"--worker={k}" for k in range(4)]
  assert len({call[6] for call in calls}) == 1


def test_several_slices_have_their_workers_in_order(capfd, settings_file):
  calls = dry_run(capfd, settings_file(NUM_SLICES="2"), "run", CONFIG)
  calls = [call for call in calls if "ssh" in call]
  assert [call[4:6] for call in calls] == [
    [f"grpo-1-{node}", f"--worker={k}"] for node in range(2) for k in range(4)
  ]


def test_the_environment_is_in_no_command(capfd, settings_file):
  file = settings_file(ENV="HF_TOKEN=a-secret")
  calls = dry_run(capfd, file, "run", CONFIG)
  assert sum("scp" in call for call in calls) == 4
  assert "a-secret" not in str(calls)


@pytest.mark.parametrize("verb", ["create", "supervise", "status", "delete"])
def test_a_slice_that_only_gke_has_is_refused(capfd, settings_file, verb):
  file = settings_file(ACCELERATOR_TYPE="tpu7x-16", IMAGE="an-image")
  words = [CONFIG] if verb == "supervise" else []
  assert command_line.main([file, "--dry-run", verb, *words]) == 64
  assert "jobset" in capfd.readouterr().err
  assert command_line.main([file, "jobset", CONFIG]) == 0
  assert "tpu7x" in capfd.readouterr().out
