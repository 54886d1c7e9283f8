"""The JobSet is valid and runs the same command as the slice."""

import jsonschema
import pytest
import yaml

from grpo_tpu.distributed import hardware
from launch.pod import jobset, shapes, workers
from tests.launch.pod import fake_cloud

IMAGE = "europe-docker.pkg.dev/p/r/grpo_tpu:1"
JOB = workers.Job("configs/my config.py:lora", ("--config.a=$(x) 'y'",))


def manifest(**changes: str) -> dict:
  settings = fake_cloud.settings(**({"IMAGE": IMAGE} | changes))
  return yaml.safe_load(jobset.manifest(settings, JOB))


def closed(**properties) -> dict:
  return {
    "type": "object",
    "properties": properties,
    "required": list(properties),
    "additionalProperties": False,
  }


# The part of JobSet v1alpha2 that is used here. Kubernetes' own schema checks
# the Job inside.
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
TEXT = {"type": "string", "maxLength": 63, "pattern": "^[a-z0-9-]+$"}
RULE = closed(
  name={"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_]*$"},
  action={"enum": ["FailJobSet", "RestartJobSet"]},
  onJobFailureReasons={
    "type": "array",
    "items": {"enum": ["PodFailurePolicy", "BackoffLimitExceeded"]},
  },
)  # fmt: skip
REPLICATED_JOB = closed(
  name=TEXT,
  replicas={"type": "integer", "minimum": 1},
  template=closed(spec={"type": "object"}),
)
SCHEMA = closed(
  apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
  kind={"const": "JobSet"},
  metadata=closed(
    name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS
  ),
  spec=closed(
    failurePolicy=closed(
      maxRestarts={"type": "integer", "minimum": 0},
      rules={"type": "array", "items": RULE},
    ),
    replicatedJobs={"type": "array", "items": REPLICATED_JOB, "maxItems": 1},
  ),
)  # fmt: skip


def job_of(made: dict) -> dict:
  return made["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(made: dict) -> dict:
  return job_of(made)["template"]["spec"]


WAYS = pytest.mark.parametrize(
  "changes",
  [
    {},
    {"WORKDIR": "/mnt/a shared disk"},
    {"CAPACITY": "on-demand"},
    {"LABELS": "team=vision", "MAX_RESTARTS": "0"},
    {"ENV": "HF_TOKEN=secret\nA=$(x)", "NUM_SLICES": "4"},
    {"CAPACITY": "flex-start", "MAX_RUN_DURATION": "1d"},
    {"CAPACITY": "reserved", "RESERVATION": "projects/p/reservations/mine"},
    *({"ACCELERATOR_TYPE": name} for name in shapes.SHAPES),
  ],
  ids=str,
)


@WAYS
def test_a_manifest_is_one_that_jobset_knows(changes):
  jsonschema.Draft202012Validator(SCHEMA).validate(manifest(**changes))


@WAYS
def test_the_job_inside_is_one_that_kubernetes_knows(changes):
  kubernetes_validate = pytest.importorskip("kubernetes_validate")
  job = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "a"},
    "spec": job_of(manifest(**changes)),
  }
  version = kubernetes_validate.latest_version()
  kubernetes_validate.validate(job, version, strict=True)
  job["spec"]["paralelism"] = 1
  with pytest.raises(kubernetes_validate.ValidationError):
    kubernetes_validate.validate(job, version, strict=True)


def test_it_runs_the_command_of_the_slice():
  pod = pod_of(manifest())
  (container,) = pod["containers"]
  assert container["args"] == [
    "--config=configs/my config.py:lora",
    # Kubernetes expands $(NAME) in arguments; $$ stands for $.
    "--config.a=$$(x) 'y'",
    "--workdir=gs://my-bucket/runs/first",
  ]
  assert container["volumeMounts"] == pod["volumes"] == []


def test_a_workdir_path_is_a_folder_of_the_node():
  pod = pod_of(manifest(WORKDIR="/mnt/a disk"))
  (mount,), (volume,) = pod["containers"][0]["volumeMounts"], pod["volumes"]
  assert mount == {"name": volume["name"], "mountPath": "/mnt/a disk"}
  assert volume["hostPath"]["path"] == "/mnt/a disk"
  assert pod["containers"][0]["args"][-1] == "--workdir=/mnt/a disk"


def test_a_slice_asks_for_nodes_of_its_capacity():
  def labels(**changes: str) -> dict[str, str]:
    nodes = pod_of(manifest(**changes))["nodeSelector"]
    return {k.partition("/")[2]: x for k, x in nodes.items() if "tpu-" not in k}

  assert labels(CAPACITY="spot") == {"gke-spot": "true"}
  assert labels(CAPACITY="on-demand") == labels(CAPACITY="reserved") == {}
  flex = labels(CAPACITY="flex-start", MAX_RUN_DURATION="1d")
  assert flex == {"gke-flex-start": "true"}
  full = labels(CAPACITY="reserved", RESERVATION="projects/p/reservations/mine")
  assert full == {"reservation-name": "mine"}


def test_each_slice_is_a_job():
  (replicated,) = manifest(NUM_SLICES="4")["spec"]["replicatedJobs"]
  assert replicated["replicas"] == 4
  assert replicated["template"]["spec"]["parallelism"] == 4  # Its hosts.


def test_secrets_come_from_a_secret_and_are_not_printed():
  lines = "HF_TOKEN=hidden\nWANDB_API_KEY=hidden\nA=$(x)\nEMPTY="
  made = manifest(ENV=lines)
  variables = pod_of(made)["containers"][0]["env"]
  source = {"secretKeyRef": {"name": "grpo-1", "key": "HF_TOKEN"}}
  assert variables[0] == {"name": "HF_TOKEN", "valueFrom": source}
  assert variables[2:] == [
    *({"name": "A", "value": "$$(x)"}, {"name": "EMPTY", "value": ""}),
  ]
  assert "hidden" not in str(made)


def outcome(made: dict, exit_code: int, *conditions: str) -> str:
  """What Kubernetes and JobSet do, by their documents, when a pod fails."""
  for rule in job_of(made)["podFailurePolicy"]["rules"]:
    codes = rule.get("onExitCodes", {"values": []})["values"]
    types = [x["type"] for x in rule.get("onPodConditions", [])]
    if exit_code in codes or set(types) & set(conditions):
      if rule["action"] == "Ignore":
        return "another pod"
      (policy,) = made["spec"]["failurePolicy"]["rules"]
      assert policy["onJobFailureReasons"] == ["PodFailurePolicy"]
      return policy["action"]
  assert job_of(made)["backoffLimit"] == 0
  return "restart"


def test_only_a_wrong_setting_fails_a_jobset_for_good():
  made = manifest()
  for code in (1, 75, 76, 134, 137, 139, 143):
    assert outcome(made, code) == "restart"
  assert outcome(made, 64) == "FailJobSet"
  for code in (1, 64, 75, 137):
    assert outcome(made, code, "DisruptionTarget") == "another pod"


@pytest.mark.parametrize(
  "accelerator_type, accelerator, topology, hosts, chips_per_host",
  [
    ("v5litepod-1", "tpu-v5-lite-podslice", "1x1", 1, 1),
    ("v5litepod-8", "tpu-v5-lite-podslice", "2x4", 1, 8),
    ("v5litepod-16", "tpu-v5-lite-podslice", "4x4", 4, 4),
    ("v6e-256", "tpu-v6e-slice", "16x16", 64, 4),
    ("v5p-8", "tpu-v5p-slice", "2x2x1", 1, 4),
    ("v5p-16", "tpu-v5p-slice", "2x2x2", 2, 4),
    ("v5p-64", "tpu-v5p-slice", "2x4x4", 8, 4),
  ],
)
def test_a_slice_has_its_hosts(
  accelerator_type, accelerator, topology, hosts, chips_per_host
):
  """From Google's tables."""
  shape = shapes.SHAPES[accelerator_type]
  assert shape == shapes.Shape(
    shape.chip, accelerator, topology, hosts, chips_per_host
  )
  assert hardware.parse_topology(shape.slice_name).num_chips == (
    hosts * chips_per_host
  )
  job = job_of(manifest(ACCELERATOR_TYPE=accelerator_type))
  assert job["parallelism"] == job["completions"] == hosts
  limits = job["template"]["spec"]["containers"][0]["resources"]["limits"]
  assert limits == {"google.com/tpu": str(chips_per_host)}


@pytest.mark.parametrize(
  "changes, words",
  [({"IMAGE": ""}, "IMAGE"), ({"ACCELERATOR_TYPE": "v5p-12"}, "v5p-16")],
)
def test_settings_that_gke_cannot_run_are_refused(changes, words):
  with pytest.raises(ValueError, match=words):
    manifest(**changes)
