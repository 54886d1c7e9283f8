"""The JobSet for GKE that runs the same command as the slice.

References:
  https://cloud.google.com/kubernetes-engine/docs/how-to/cloud-storage-fuse-csi-driver-setup
"""

import json
import pathlib
import string
from typing import Any

from launch.pod import settings as pod_settings
from launch.pod import shapes, workers

# Checkpoints become visible when their folder is renamed. The image's user is
# 10001.
_MOUNT_OPTIONS = "implicit-dirs,rename-dir-limit=100000,uid=10001,gid=10001"


def manifest(settings: pod_settings.Settings, job: workers.Job) -> str:
  """The JobSet of a run, as YAML.

  Raises:
    ValueError: The settings name no image, or a slice that GKE does not offer.
  """
  if not settings.image:
    raise ValueError(
      "IMAGE ('') must name an image, because GKE runs only images; build the"
      " Dockerfile, push the image, and write its name."
    )
  shape = shapes.SHAPES.get(settings.accelerator_type)
  if shape is None:
    raise ValueError(
      f"ACCELERATOR_TYPE ({settings.accelerator_type!r}) must be one of"
      f" {', '.join(shapes.SHAPES)} for GKE; choose one of them."
    )
  nodes = {
    "cloud.google.com/gke-tpu-accelerator": shape.gke_accelerator,
    "cloud.google.com/gke-tpu-topology": shape.topology,
  }
  if settings.capacity == "spot":
    nodes["cloud.google.com/gke-spot"] = "true"
  volume: dict[str, Any] = {"name": "workdir"}
  pod_metadata = {}
  folder = workdir = settings.workdir
  if settings.bucket:
    folder = f"/buckets/{settings.bucket}"
    workdir = f"{folder}/{settings.path_in_bucket}"
    pod_metadata["annotations"] = {"gke-gcsfuse/volumes": "true"}
    attributes = {"bucketName": settings.bucket, "mountOptions": _MOUNT_OPTIONS}
    driver = "gcsfuse.csi.storage.gke.io"
    volume["csi"] = {"driver": driver, "volumeAttributes": attributes}
  else:
    # Every node has mounted the path already.
    volume["hostPath"] = {"path": folder, "type": "Directory"}
  words = [*job.words, f"--workdir={workdir}"]
  values = {
    "name": settings.name,
    "namespace": settings.kubernetes_namespace,
    "labels": dict(x.split("=") for x in settings.all_labels.split(",")),
    "max_restarts": int(settings.max_restarts),
    "hosts": shape.hosts,
    "pod_metadata": pod_metadata,
    "service_account": settings.kubernetes_service_account,
    "grace_seconds": int(settings.grace_seconds),
    "node_selector": nodes,
    "image": settings.image,
    # Kubernetes would expand $(NAME) in arguments; $$ stands for $.
    "args": [word.replace("$", "$$") for word in words],
    "chips": {"google.com/tpu": str(shape.chips_per_host)},
    "folder": folder,
    "volume": volume,
  }
  template = pathlib.Path(__file__).with_suffix(".yaml")
  # A JSON value is a YAML value.
  return string.Template(template.read_text(encoding="utf-8")).substitute(
    {name: json.dumps(x, ensure_ascii=False) for name, x in values.items()}
  )
