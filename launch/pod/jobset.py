"""The JobSet for GKE that runs the same command as the slice."""

import json
import pathlib
import re
import string

from data_pipelines import validation
from launch.pod import settings as pod_settings
from launch.pod import shapes, workers

# Values of these variables are not printed: they come from a Secret.
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|KEY", re.I)


def manifest(settings: pod_settings.Settings, job: workers.Job) -> str:
  """The JobSet of a run, as YAML; a ValueError says what GKE does not offer."""
  validation.require(
    bool(settings.image),
    *("IMAGE", settings.image, "name an image, because GKE runs only images"),
    "build the Dockerfile, push the image, and write its name",
  )
  name = settings.accelerator_type
  validation.require_one_of("ACCELERATOR_TYPE", name, list(shapes.SHAPES))
  shape = shapes.SHAPES[name]
  nodes = {
    "cloud.google.com/gke-tpu-accelerator": shape.gke_accelerator,
    "cloud.google.com/gke-tpu-topology": shape.topology,
  }
  if settings.capacity in ("spot", "flex-start"):
    nodes[f"cloud.google.com/gke-{settings.capacity}"] = "true"
  if name := settings.reservation.rpartition("/")[2]:
    nodes["cloud.google.com/reservation-name"] = name
  volumes, mounts = [], []
  if not settings.bucket:
    # Every node has mounted the path already.
    path = {"path": settings.workdir, "type": "Directory"}
    volumes = [{"name": "workdir", "hostPath": path}]
    mounts = [{"name": "workdir", "mountPath": settings.workdir}]
  variables = []
  for name, value in settings.environment.items():
    source = {"secretKeyRef": {"name": settings.name, "key": name}}
    plain = {"value": value.replace("$", "$$")}
    found = {"valueFrom": source} if _SECRET.search(name) else plain
    variables.append({"name": name} | found)
  words = [*job.words, f"--workdir={settings.workdir}"]
  numbers = ("max_restarts", "num_slices", "grace_seconds")
  values = vars(settings) | {
    **{name: int(getattr(settings, name)) for name in numbers},
    "labels": dict(x.split("=") for x in settings.all_labels.split(",")),
    "hosts": shape.hosts,
    "node_selector": nodes,
    # Kubernetes would expand $(NAME) in arguments; $$ stands for $.
    "args": [word.replace("$", "$$") for word in words],
    "env": variables,
    "chips": {"google.com/tpu": str(shape.chips_per_host)},
    "volumes": volumes,
    "mounts": mounts,
  }
  template = pathlib.Path(__file__).with_suffix(".yaml")
  # A JSON value is a YAML value.
  return string.Template(template.read_text(encoding="utf-8")).substitute(
    {name: json.dumps(x, ensure_ascii=False) for name, x in values.items()}
  )
