"""The same run on GKE: a JobSet, from the same settings.

All hosts are one Job, which JobSet starts again as a whole when any of them
ends, on other nodes if theirs were taken away; a wrong setting (64) or an error
(1) ends it for good. What the nodes need: a TPU node pool of the slice's
topology, JobSet, and the Cloud Storage FUSE driver for a workdir in a bucket.

References:
  https://jobset.sigs.k8s.io/docs/concepts/
  https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice
  https://cloud.google.com/kubernetes-engine/docs/how-to/cloud-storage-fuse-csi-driver-setup
"""

from typing import Any

from launch.pod import settings, shapes, workers

_BUCKET_FOLDER = "/buckets/"


def manifest(of: settings.Settings, job: workers.Job) -> dict[str, Any]:
  """The JobSet of a run; kubectl takes it as JSON.

  Raises:
    ValueError: The settings name no image, or a slice that GKE has not.
  """
  if not of.image:
    raise ValueError(
      "IMAGE ('') must be given for GKE, which runs nothing else; build the"
      " Dockerfile, push it, and write its name."
    )
  shape = shapes.shape(of.accelerator_type)
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {
      "name": of.name,
      "namespace": of.kubernetes_namespace,
      "labels": dict(label.split("=") for label in of.all_labels.split(",")),
      "annotations": {
        # All hosts in one node pool, which is one slice.
        "alpha.jobset.sigs.k8s.io/exclusive-topology": (
          "cloud.google.com/gke-nodepool"
        ),
      },
    },
    "spec": {
      "failurePolicy": {
        "maxRestarts": int(of.max_restarts),
        "rules": [
          {
            "name": "errors",
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
          }
        ],
      },
      "replicatedJobs": [
        {
          "name": "slice",
          "replicas": 1,
          "template": {"spec": _job(of, job, shape)},
        }
      ],
    },
  }


def _job(
  of: settings.Settings, job: workers.Job, shape: shapes.Shape
) -> dict[str, Any]:
  return {
    "parallelism": shape.hosts,
    "completions": shape.hosts,
    "completionMode": "Indexed",
    "backoffLimit": 0,
    "podFailurePolicy": {
      "rules": [
        {
          "action": "FailJob",
          "onExitCodes": {
            "containerName": "trainer",
            "operator": "In",
            "values": [1, 64],
          },
        }
      ]
    },
    "template": {
      "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}
      if of.bucket
      else {},
      "spec": _pod(of, job, shape),
    },
  }


def _pod(
  of: settings.Settings, job: workers.Job, shape: shapes.Shape
) -> dict[str, Any]:
  folder = _BUCKET_FOLDER + of.bucket if of.bucket else of.workdir
  workdir = f"{folder}/{of.path_in_bucket}" if of.bucket else folder
  words = [f"--config={job.config}", *job.flags, f"--workdir={workdir}"]
  volume: dict[str, Any] = {"name": "workdir"}
  if of.bucket:
    volume["csi"] = {
      "driver": "gcsfuse.csi.storage.gke.io",
      "volumeAttributes": {
        "bucketName": of.bucket,
        # Checkpoints become visible by renaming their folder; the image's user
        # is 10001.
        "mountOptions": (
          "implicit-dirs,rename-dir-limit=100000,uid=10001,gid=10001"
        ),
      },
    }
  else:
    # On every node, mounted there already.
    volume["hostPath"] = {"path": of.workdir, "type": "Directory"}
  chips = {"google.com/tpu": str(shape.chips_per_host)}
  nodes = {
    "cloud.google.com/gke-tpu-accelerator": shape.gke_accelerator,
    "cloud.google.com/gke-tpu-topology": shape.topology,
  }
  if of.capacity == "spot":
    nodes["cloud.google.com/gke-spot"] = "true"
  return {
    "restartPolicy": "Never",
    "serviceAccountName": of.kubernetes_service_account,
    "terminationGracePeriodSeconds": int(of.grace_seconds),
    "nodeSelector": nodes,
    "containers": [
      {
        "name": "trainer",
        "image": of.image,
        # Kubernetes would put a variable where $(NAME) stands.
        "args": [word.replace("$", "$$") for word in words],
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"requests": chips, "limits": chips},
        "securityContext": {"privileged": True},
        "volumeMounts": [{"name": "workdir", "mountPath": folder}],
      }
    ],
    "volumes": [volume],
  }
