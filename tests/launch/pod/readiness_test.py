"""`check` finds what is missing before anything costs money."""

import json
import shutil
import subprocess

import pytest

from launch.pod import check, exits, readiness, workers
from tests.launch.pod import fake_cloud

Exit = exits.Exit
DATA = "gs://my-bucket/data"
PATH = f"--config.data.dir={DATA}"
CONFIG = "configs/my config.py"
SPOT = "tpu-v5s-litepod-preemptible"


def quota(name: str, limit: int, **where: str) -> dict:
  buckets = [{"effectiveLimit": str(limit), "dimensions": where}]
  limits = [{"quotaBuckets": buckets}]
  return {"metric": f"tpu.googleapis.com/{name}", "consumerQuotaLimits": limits}


class Project:
  """Answers calls of gcloud by the first words that match.

  Attributes:
    answers: Output, or a failure, by the beginning of a call.
  """

  dry_run = False

  def __init__(self, **changes: str):
    self.settings = fake_cloud.settings(**changes)
    quotas = [quota(SPOT, 16, zone="europe-west4-b")]
    self.answers = {
      "services list": "compute.googleapis.com\nstorage.googleapis.com\n"
      "tpu.googleapis.com\n",
      "storage buckets describe": "EUROPE-WEST4\n",
      "alpha services quota": json.dumps(quotas),
    }
    self.calls: list[str] = []

  def call(self, *words: str) -> subprocess.CompletedProcess[str]:
    line = " ".join(words)
    self.calls.append(line)
    for start, answer in self.answers.items():
      if line.startswith(start):
        if isinstance(answer, exits.Failure):
          raise answer
        return subprocess.CompletedProcess(words, 0, answer, "")
    return subprocess.CompletedProcess(words, 0, "", "")

  def wrong(self, **options: bool) -> list[str]:
    job = workers.Job("configs/smoke.py", (PATH,))
    self.results = list(readiness.check_cloud(self, job, **options))
    return [text for verdict, text in self.results if verdict == "WRONG"]


def test_a_project_that_has_everything_is_ready():
  project = Project()
  assert project.wrong() == []
  assert len([x for x, _ in project.results if x == "ok"]) == 7


NO = exits.Failure(Exit.NOT_ALLOWED, "no")
GONE = exits.Failure(Exit.ABSENT, "no")
SMALL = json.dumps([quota(SPOT, 8, region="europe-west4")])


@pytest.mark.parametrize(
  "call, answer, words",
  [
    ("services list", "compute.googleapis.com\n", "gcloud services enable"),
    ("services list", NO, "auth login"),
    ("compute tpus accelerator-types", GONE, "list --zone=europe-west4-b"),
    ("storage buckets describe", GONE, "my-bucket --location=europe-west4"),
    ("storage buckets describe", "US-EAST1\n", "in europe-west4: US-EAST1"),
    ("storage buckets describe", "US\n", "in europe-west4: US"),
    ("storage cp", NO, "roles/storage."),
    ("storage ls", GONE, "cp --recursive FOLDER gs://my-bucket/data"),
    ("alpha services quota", SMALL, "8 of 16 cores"),
  ],
)
def test_what_is_wrong_comes_with_a_command(call, answer, words):
  project = Project()
  project.answers |= {call: answer}
  (text,) = project.wrong()
  assert words in text


@pytest.mark.parametrize("location", ["EU", "europe-west4"])
def test_a_bucket_of_the_continent_will_do(location):
  project = Project()
  project.answers["storage buckets describe"] = location
  assert project.wrong() == []


@pytest.mark.parametrize(
  "answer",
  [
    exits.Failure(Exit.GCLOUD, "no alpha"),
    "nonsense",
    "[1]",
    json.dumps([quota("tpu-v5s-litepod-serving-preemptible", 0)]),
    json.dumps([quota("tpu-v5s-litepod", 0, zone="europe-west4-b")]),
    json.dumps([quota(SPOT, 0, zone="us-a1-b")]),
  ],
)
def test_quota_that_gcloud_cannot_tell_is_not_tested(answer):
  project = Project()
  project.answers["alpha services quota"] = answer
  assert project.wrong() == []
  assert project.results[-1][0] == "not tested"


def test_every_slice_counts_and_no_limit_is_enough():
  project = Project(NUM_SLICES="2")
  assert "16 of 32 cores" in project.wrong()[0]
  answer = json.dumps([quota(SPOT, -1, zone="europe-west4-b")])
  project.answers["alpha services quota"] = answer
  assert project.wrong() == []


def test_the_service_account_is_looked_for_in_both_policies():
  project = Project(SERVICE_ACCOUNT="a@p.iam.gserviceaccount.com")

  def policy(role: str, member: str) -> str:
    members = [f"serviceAccount:{member}", "user:me"]
    return json.dumps({"bindings": [{"members": members, "role": role}]})

  mine = policy("roles/storage.objectUser", "a@p.iam.gserviceaccount.com")
  other = policy("roles/storage.admin", "b@p.iam.gserviceaccount.com")
  reads = policy("roles/storage.objectViewer", "a@p.iam.gserviceaccount.com")
  call, second = "storage buckets get-iam-policy", "projects get-iam-policy"
  for first, then, is_right in (
    (mine, "{}", True),
    ("{}", mine, True),
    (other, reads, False),
    (reads, "{}", False),
  ):
    project.answers |= {call: first, second: then}
    assert (project.wrong() == []) == is_right
  project.answers |= {second: NO}
  assert project.wrong() == []


def test_the_cheap_part_asks_for_the_bucket_alone():
  project = Project()
  assert project.wrong(only_cheap=True) == []
  assert len(project.calls) == 1 and "buckets describe" in project.calls[0]


def test_without_a_bucket_its_items_are_not_tested():
  account = "a@p.iam.gserviceaccount.com"
  project = Project(WORKDIR="/shared/run", SERVICE_ACCOUNT=account)
  assert project.wrong() == []
  assert ("not tested", "bucket: none is named") in project.results
  assert not [text for _, text in project.results if "{" in text]
  assert [x for x in project.calls if "storage" in x] == [f"storage ls {DATA}"]


def test_each_zone_is_checked_once():
  project = Project(ZONE="europe-west4-b,us-east1-c")
  wrong = project.wrong()
  assert len(wrong) == 1 and "my-bucket in us-east1" in wrong[0]
  assert len([x for x in project.calls if "buckets describe" in x]) == 2
  assert len([x for x in project.calls if "storage ls" in x]) == 1


def test_each_path_of_the_command_is_looked_for():
  project = Project()
  flags = (f"{PATH}2", PATH, "--config.model.weights=hf:gs://my-bucket/w")
  job = workers.Job("configs/smoke.py", flags)
  names = [text for _, text in readiness.check_cloud(project, job)]
  for name in ("data2", "data", "w"):
    assert f"gs://my-bucket/{name}" in names


@pytest.mark.nightly  # Each call of gcloud takes a second.
@pytest.mark.skipif(not shutil.which("gcloud"), reason="no gcloud on PATH")
def test_the_real_gcloud_is_asked(laptop, cloud):
  cloud.store.put("my-bucket", "data/x", b"x", "text/plain", {})
  done = laptop.tpu("check", CONFIG, "--", PATH)
  assert done.returncode == Exit.BAD_REQUEST
  wrong = [x for x in done.stdout.splitlines() if x.startswith("WRONG")]
  assert len(wrong) <= 1 and "WRONG      memory" in "".join(wrong)
  laptop.settings["ZONE"] = "us-central1-a"
  del cloud.described["v5litepod-16"]
  done = laptop.tpu("check", CONFIG, "--", f"{PATH}/none")
  assert done.returncode == Exit.BAD_REQUEST
  for words in ("v5litepod-16 in us-", "bucket my-bucket in us-", "data/none"):
    assert f"WRONG      {words}" in done.stdout.replace("gs://my-bucket/", "")
  assert laptop.token not in done.stdout + done.stderr


def test_memory_is_not_tested_without_libtpu(monkeypatch):
  monkeypatch.setattr(check, "_python", lambda: "false")
  job = workers.Job("configs/smoke.py", ())
  verdict, text = check.check_memory(fake_cloud.settings(), job)
  assert verdict == "not tested" and "libtpu" in text
