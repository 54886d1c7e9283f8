"""The real gcloud, with an API and workers on this machine."""

import json
import re

import pytest

from tests.launch.pod import fake_cloud

pytestmark = fake_cloud.needs_gcloud

CONFIG = "configs/my config.py"


def starts(cloud) -> list[dict]:
  path = cloud.folder / "started"
  lines = path.read_text().splitlines() if path.exists() else []
  return [json.loads(line) for line in lines]


def asked(cloud) -> list[str]:
  """The requests that change something, without those for ssh keys."""
  return [
    f"{method} {re.sub(r'.*/locations/[^/]*/', '', url)}"
    for method, url, _ in cloud.requests
    if method != "PATCH"
  ]


def test_a_run_from_create_to_delete_with_a_preemption(laptop, cloud, tmp_path):
  """The machines vanish in the middle, and the names are full of traps."""
  workdir = tmp_path / "a shared disk" / "the 'first' $(run)"
  laptop.settings |= {"WORKDIR": str(workdir), "LABELS": "team=vision"}
  cloud.requested_states = ["WAITING_FOR_RESOURCES", "ACTIVE"]
  said = ""

  def tpu(*words: str) -> str:
    nonlocal said
    done = laptop.tpu(*words)
    assert done.returncode == 0, done.stderr
    said += done.stdout + done.stderr
    return done.stdout + done.stderr

  tpu("create")
  create = "POST queuedResources?alt=json&queuedResourceId=grpo-1"
  assert asked(cloud) == [create]
  body = cloud.requests[0][2]
  assert body["queueingPolicy"] == {"validUntilDuration": "21600s"}
  assert "spot" in body
  node = body["tpu"]["nodeSpec"][0]["node"]
  assert node["acceleratorType"] == "v5litepod-16"
  assert node["runtimeVersion"] == "v2-alpha-tpuv5-lite"
  assert node["labels"] == {"grpo-tpu": "grpo-1", "team": "vision"}
  assert "already exists" in tpu("create")
  assert asked(cloud) == [create]

  assert "2 workers" in tpu("wait", "--poll=0.1")
  tpu("setup")
  commit = laptop.git("rev-parse", "HEAD")
  for number in range(2):
    code = cloud.worker(number) / "grpo_tpu" / "code"
    assert (code / "COMMIT").read_text() == f"{commit}\n"
    assert (code / CONFIG).exists()
    assert not (code / "launch" / "tpu.env").exists()

  flags = ['--config.a=it\'s $HOME; `x` "y"', "--config.b=('m:f',)"]
  tpu("run", CONFIG, "--", *flags)
  one, other = starts(cloud)
  assert one["words"] == other["words"]
  assert one["words"] == [
    *("-m", "grpo_tpu.main", f"--config={CONFIG}", *flags),
    "--config.checkpoint.every_minutes=10",
    f"--workdir={workdir}",
  ]
  assert {one["worker"], other["worker"]} == {"127.0.0.10", "127.0.0.11"}
  cloud.tell("step", 3)
  fake_cloud.eventually(lambda: (workdir / "checkpoints" / "00000003").exists())
  status = tpu("status")
  assert status.count("running") == 2
  assert "last step 3; newest checkpoint 3" in status

  process = laptop.start(
    *("supervise", "--poll=0.3", "--pause=0.1", CONFIG, "--", *flags)
  )
  looks = cloud.looks
  fake_cloud.eventually(lambda: cloud.looks > looks + 2)
  assert len(starts(cloud)) == 2  # It found the run and did not disturb it.
  cloud.will_preempt = True
  fake_cloud.eventually(lambda: len(starts(cloud)) == 4)
  assert [start["words"] for start in starts(cloud)] == [one["words"]] * 4
  cloud.tell("step", 5)
  fake_cloud.eventually(lambda: (workdir / "checkpoints" / "00000005").exists())
  cloud.tell("end", 0)
  out, err = process.communicate(timeout=300)
  said += out + err
  assert process.returncode == 0, err
  assert "(exit code 83, SUSPENDED)" in err
  log = (cloud.worker(1) / "grpo_tpu" / "run" / "log").read_text()
  assert "127.0.0.11 resumes from step 3" in log

  assert "exit code 0" in tpu("status")
  tpu("delete")
  delete = "DELETE queuedResources/grpo-1?alt=json&force=True"
  assert asked(cloud) == [create, delete, create, delete]
  assert cloud.nodes == cloud.queued == {}
  assert "nothing to delete" in tpu("delete")
  assert laptop.token not in said


@pytest.mark.nightly  # Some 40 calls of gcloud.
def test_two_slices_in_the_second_zone_from_create_to_delete(
  laptop, cloud, tmp_path
):
  """The environment reaches every worker, and nothing prints it."""
  laptop.settings |= {
    **{"WORKDIR": str(tmp_path / "a workdir"), "NUM_SLICES": "2"},
    **{"ZONE": "us-east5-b,europe-west4-a", "AUTOCHECKPOINT": "yes"},
    **{"ENV": "HF_TOKEN=a-secret $HOME\nB='c'", "NETWORK_TAGS": "a,b"},
  }
  cloud.full_zones = {"us-east5-b"}
  said = ""
  for words in (
    *(("create",), ("wait", "--poll=0.1"), ("setup",), ("run", CONFIG)),
    *(("status",), ("logs",), ("stop",), ("delete",)),
  ):
    done = laptop.tpu(*words)
    assert done.returncode == 0, done.stderr
    said += done.stdout + done.stderr
    if words == ("create",):
      (_, url, body) = cloud.requests[-1]
      assert "/europe-west4-a/" in url and "/v2alpha1/" in url
      spec = body["tpu"]["nodeSpec"][0]
      assert spec["multiNodeParams"] == {"nodeCount": 2}
      assert spec["node"]["autocheckpointEnabled"] is True
      assert spec["node"]["tags"] == ["a", "b"]
      assert body["provisioningModel"] == "SPOT" and "spot" in body
    if words == ("run", CONFIG):
      made = starts(cloud)
      assert len({start["worker"] for start in made}) == len(made) == 4
      for start in made:
        assert start["environment"]["HF_TOKEN"] == "a-secret $HOME"
        assert start["environment"]["B"] == "'c'"
  assert "4 workers" in said and "us-east5-b refuses the slice" in said
  assert cloud.nodes == cloud.queued == {}
  assert "a-secret" not in said
