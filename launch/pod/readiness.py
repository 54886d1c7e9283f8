"""Checks what a run needs in Google Cloud, before anything costs money.

`readiness.toml` has the calls of gcloud.
"""

import json
import pathlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from launch.pod import gcloud, lease, shapes, workers
from launch.pod.exits import Exit, Failure

_TABLE = tomllib.loads(
  pathlib.Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)
# A run may start in spite of these.
_PASSING = (Exit.NETWORK, Exit.UNAVAILABLE)
# Buckets of several regions lie in these.
_CONTINENTS = {"us": "us", "europe": "eu", "asia": "asia"}


def check_cloud(
  cloud: gcloud.Gcloud, job: workers.Job, *, only_cheap: bool = False
) -> Iterator[tuple[str, str]]:
  """Checks the project; yields "ok", "WRONG" or "not tested", and why."""
  settings = cloud.settings
  values = {**vars(settings), "bucket": settings.bucket or ""}
  values["file"] = str(pathlib.Path(__file__).with_name("__init__.py"))
  values["url"] = lease.url(settings, "check") if settings.bucket else ""
  paths = re.findall(r"gs://[^\s'\",()]+", " ".join(job.flags))
  for item in _TABLE["item"]:
    if only_cheap and "is_cheap" not in item:
      continue
    results = {}
    for zone in settings.zones:
      values["zone"], values["region"] = zone, zone.rpartition("-")[0]
      continent = zone.partition("-")[0]
      values["continent"] = _CONTINENTS.get(continent, continent)
      # Only the last item is about a path.
      for values["path"] in paths or [""]:
        name = _fill(item["name"], values)
        if name not in results:
          results[name] = _check_item(cloud, item, values, only_cheap)
    yield from results.values()
  if not only_cheap:
    yield from (_check_quota(cloud, zone) for zone in settings.zones)


def _fill(text: str, values: Mapping[str, str]) -> str:
  return re.sub(r"\{([a-z_]+)\}", lambda match: values[match[1]], text)


def _check_item(
  cloud: gcloud.Gcloud,
  item: Mapping[str, Any],
  values: Mapping[str, str],
  only_cheap: bool,
) -> tuple[str, str]:
  name = _fill(item["name"], values)
  if not values[item.get("needs", "project")]:
    return "not tested", f"{item['name']}: none is named"
  reason = ""
  for call in item["calls"]:
    try:
      output = cloud.call(*[_fill(x, values) for x in call.split()]).stdout
    except Failure as failure:
      if "is_private" in item or (only_cheap and failure.exit in _PASSING):
        return "not tested", f"{name}: {failure}"
      reason = str(failure)
    else:
      pattern = _fill(item.get("expects", ""), values)
      if cloud.dry_run or re.search(pattern, output):
        return "ok", name
      reason = " ".join(output.split()) or "nothing is there"
  return "WRONG", f"{name}: {reason}\n  {_fill(item['remedy'], values)}"


def _check_quota(cloud: gcloud.Gcloud, zone: str) -> tuple[str, str]:
  """Compares the cores of the slices with the quota of a zone."""
  settings = cloud.settings
  shape = shapes.SHAPES.get(settings.accelerator_type)
  pattern = _TABLE["quota"].get(shape.chip, "$.") if shape else "$."
  is_spot = settings.capacity == "spot"
  words = ["alpha", "services", "quota", "list", "--format=json"]
  words += ["--service=tpu.googleapis.com"]
  words += [f"--consumer=projects/{settings.project}"]
  limits = []
  try:
    for metric in json.loads(cloud.call(*words).stdout or "[]"):
      name = str(metric.get("metric")).lower()
      is_other = "serving" in name or ("preemptible" in name) != is_spot
      if is_other or not re.search(pattern, name):
        continue
      for limit in metric.get("consumerQuotaLimits", ()):
        for bucket in limit.get("quotaBuckets", ()):
          where = bucket.get("dimensions", {})
          if where in ({"zone": zone}, {"region": zone.rpartition("-")[0]}):
            limits.append(int(bucket.get("effectiveLimit", 0)))
  except (Failure, TypeError, ValueError, AttributeError) as error:
    return "not tested", f"quota in {zone}: gcloud cannot tell: {error}"
  needed = int(settings.accelerator_type.rpartition("-")[2])
  needed *= len(settings.nodes)
  known = [limit for limit in limits if limit >= 0]  # -1 is unlimited.
  if not limits:
    return "not tested", f"quota in {zone}: gcloud lists none that is known"
  if min(known, default=needed) >= needed:
    return "ok", f"quota in {zone} for {needed} cores, if nothing else runs"
  page = "https://console.cloud.google.com/iam-admin/quotas?project="
  return "WRONG", (
    f"quota in {zone}: {min(known)} of {needed} cores\n  Ask for more at"
    f" {page}{settings.project}&service=tpu.googleapis.com"
  )
