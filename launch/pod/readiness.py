"""Checks what a run needs in Google Cloud, before anything costs money.

`readiness.toml` has the calls of gcloud.
"""

import itertools
import json
import pathlib
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from launch.pod import gcloud, lease, workers
from launch.pod.exits import Exit, Failure

_TABLE = tomllib.loads(
  pathlib.Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)


def check_cloud(
  cloud: gcloud.Gcloud, job: workers.Job, *, only_cheap: bool = False
) -> Iterator[tuple[str, str]]:
  """Checks the project; yields "ok", "WRONG" or "not tested", and why."""
  settings = cloud.settings
  values = {**vars(settings), "bucket": settings.bucket or ""}
  values |= {"file": __file__, "url": lease.url(settings, "check")}
  paths = re.findall(r"gs://[^\s'\",()]+", " ".join(job.flags)) or [""]
  items = [x for x in _TABLE["item"] if "is_cheap" in x or not only_cheap]
  seen = set()
  for item, zone, path in itertools.product(items, settings.zones, paths):
    values |= {"zone": zone, "region": zone.rpartition("-")[0], "path": path}
    # Buckets of several regions lie in "us", "eu" or "asia".
    values["continent"] = zone.partition("-")[0].replace("europe", "eu")
    missing = [x for x in item.get("needs", ()) if not values[x]]
    name = item["name"].format_map(values)
    if missing:
      name = f"{missing[0].replace('_', ' ')}: none is named"
    if name not in seen:
      verdict, reason = "not tested", ""
      if not missing:
        verdict, reason = _check_item(cloud, item, values, only_cheap)
      yield verdict, name + reason
    seen.add(name)
  if not only_cheap:
    yield from (_check_quota(cloud, zone) for zone in settings.zones)


def _check_item(
  cloud: gcloud.Gcloud,
  item: Mapping[str, Any],
  values: Mapping[str, str],
  only_cheap: bool,
) -> tuple[str, str]:
  """The verdict, and what follows the name."""
  pattern, reason = item.get("expects", "").format_map(values), ""
  for call in item["calls"]:
    try:
      output = cloud.call(*[x.format_map(values) for x in call.split()]).stdout
    except Failure as failure:
      # A run may start in spite of a network that is away for a moment.
      is_brief = failure.exit in (Exit.NETWORK, Exit.UNAVAILABLE)
      if "is_private" in item or (only_cheap and is_brief):
        return "not tested", f": {failure}"
      reason = str(failure)
    else:
      if cloud.dry_run or re.search(pattern, output):
        return "ok", ""
      reason = " ".join(output.split()) or "nothing is there"
  return "WRONG", f": {reason}\n  {item['remedy'].format_map(values)}"


def _check_quota(cloud: gcloud.Gcloud, zone: str) -> tuple[str, str]:
  """Compares the cores of the slices with the quota of a zone."""
  settings, table, name = cloud.settings, _TABLE["quota"], f"quota in {zone}"
  kind, _, cores = settings.accelerator_type.rpartition("-")
  needed = int(cores) * len(settings.nodes)
  call = table["call"].format(project=settings.project).split()
  places = ({"zone": zone}, {"region": zone.rpartition("-")[0]})
  limits = []
  try:
    for quota in json.loads(cloud.call(*call).stdout or "[]"):
      metric = str(quota.get("metric")).lower()
      is_ours = re.search(table.get(kind, "$."), metric)
      is_spot = "preemptible" in metric
      if "serving" in metric or is_spot != (settings.capacity == "spot"):
        continue
      limits += [
        int(bucket.get("effectiveLimit", 0))
        for limit in quota.get("consumerQuotaLimits", ())
        for bucket in limit.get("quotaBuckets", ())
        if is_ours and bucket.get("dimensions") in places
      ]
  except (Failure, TypeError, ValueError, AttributeError) as error:
    return "not tested", f"{name}: gcloud cannot tell: {error}"
  if not limits:
    return "not tested", f"{name}: gcloud lists none that is known"
  limit = min((x for x in limits if x >= 0), default=needed)  # -1: unlimited.
  if limit >= needed:
    return "ok", f"{name} for {needed} cores, if nothing else runs"
  remedy = table["remedy"].format(project=settings.project)
  return "WRONG", f"{name}: {limit} of {needed} cores\n  {remedy}"
