"""The command line of `launch/tpu.sh`.

launch/tpu.sh [--settings=FILE] [--dry-run] VERB ...
"""

import argparse
import contextlib
import functools
import logging
import os
import pathlib
import shlex
import sys
import tomllib
from collections.abc import Sequence
from typing import Any, NoReturn

from data_pipelines import validation
from data_pipelines.validation import printable
from launch.pod import (
  check,
  cost,
  gcloud,
  jobset,
  lease,
  readiness,
  slices,
  supervision,
  vm,
  workers,
)
from launch.pod import settings as pod_settings
from launch.pod.exits import Exit, Failure

_TABLE: dict[str, Any] = tomllib.loads(
  pathlib.Path(__file__).with_name("verbs.toml").read_text(encoding="utf-8")
)
_DRY_RUN = "(dry run) "  # Before whatever a dry run only assumes.

# On the supervisor's machine, the file that tells an end from a crash.
_ENDED = "GRPO_TPU_ENDED"


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    self.print_usage(sys.stderr)
    self.exit(Exit.BAD_REQUEST, f"launch/tpu.sh: {printable(message)}.\n")


def _number(low: float, high: float, text: str) -> float:
  with contextlib.suppress(ValueError):
    if low <= (value := type(low)(text)) <= high:
      return value
  raise argparse.ArgumentTypeError(f"{text} must be from {low} to {high}")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog="launch/tpu.sh",
    description="Runs the program on a TPU slice.",
    epilog="docs/on-a-pod.md explains settings, exit codes and costs.",
    allow_abbrev=False,
  )
  path = workers.ROOT / "launch" / "tpu.env"
  text = "the settings file (default: launch/tpu.env)"
  parser.add_argument("--settings", type=pathlib.Path, default=path, help=text)
  dry_run = "print every call of gcloud and make none"
  parser.add_argument("--dry-run", action="store_true", help=dry_run)
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
  add = functools.partial(verbs.add_parser, allow_abbrev=False)
  texts = _TABLE["verbs"].items()
  verb = {name: add(name, help=text, description=text) for name, text in texts}
  for flag in map(dict, _TABLE["flag"]):
    users, names = flag.pop("verbs").split(), flag.pop("names").split()
    if "from" in flag:
      bounds = flag.pop("from"), flag.pop("to")
      flag["type"] = functools.partial(_number, *bounds)
    for name in users:
      verb[name].add_argument(*names, **flag)
  return parser


def _run(arguments: argparse.Namespace) -> int:
  settings = pod_settings.read(arguments.settings)
  cloud = gcloud.Gcloud(settings, dry_run=arguments.dry_run)
  verb = arguments.verb
  validation.require(
    verb == "jobset" or not settings.accelerator_type.startswith("tpu7x"),
    *("ACCELERATOR_TYPE", settings.accelerator_type, "not be tpu7x"),
    "the TPU API has none; print a `jobset` and run it on GKE",
  )
  if verb == "check":
    return _check(cloud, arguments)
  if verb in ("run", "supervise", "jobset"):
    return _start(cloud, arguments)
  if verb == "create":
    _show_prices(cloud)
    slices.create(cloud)
  elif verb == "delete":
    # The supervisor would create the slice again. It does not end itself.
    try:
      if _ENDED not in os.environ:
        vm.delete(cloud)
    finally:
      slices.delete(cloud)
  elif verb == "wait":
    found = slices.wait(
      cloud, timeout_seconds=arguments.timeout, poll_seconds=arguments.poll
    )
    details = (settings.name, cloud.zone, found.num_workers)
    logging.info("%s is ready in %s: %d workers.", *details)
  elif verb == "setup":
    count = slices.require_ready(cloud).num_workers
    _warn_of_unsent(settings)
    logging.info("Set up %d workers: %s.", count, workers.setup(cloud, count))
  elif verb == "tensorboard":
    if not settings.bucket:
      slices.require_ready(cloud)
    logging.info("http://localhost:%d in 30 s; Ctrl-C ends.", arguments.port)
    workers.tensorboard(cloud, arguments.port)
  else:
    _reach_run(cloud, arguments)
  return Exit.DONE


def _start(cloud: gcloud.Gcloud, arguments: argparse.Namespace) -> int:
  """Runs a verb that starts the program, after the checks."""
  settings, verb = cloud.settings, arguments.verb
  job = workers.Job(arguments.config, tuple(arguments.flags))
  job = job.with_defaults(settings)
  if arguments.no_check:
    logging.warning("Not checked: a wrong setting ends the run with 64.")
  else:
    check.check(settings, job)
    if verb != "jobset":
      _warn_of_unsent(settings)
      for verdict, text in readiness.check_cloud(cloud, job, only_cheap=True):
        if verdict == "WRONG":
          raise Failure(Exit.BAD_REQUEST, text)
  if verb == "supervise":
    return _supervise(cloud, job, arguments)
  if verb == "jobset":
    sys.stdout.write(jobset.manifest(settings, job))
  else:
    count = slices.require_ready(cloud).num_workers
    workers.run(cloud, count, job)
    logging.info("Started on %d workers; `logs -f` follows them.", count)
  return Exit.DONE


def _warn_of_unsent(settings: pod_settings.Settings) -> None:
  if unsent := workers.count_unsent(settings):
    logging.warning("%d files with uncommitted changes are not sent.", unsent)


def _check(cloud: gcloud.Gcloud, arguments: argparse.Namespace) -> int:
  """Prints a line for each thing that a run needs."""
  settings = cloud.settings
  job = workers.Job(arguments.config, tuple(arguments.flags))
  results = []

  def report(verdict: str, text: str) -> None:
    results.append(verdict)
    _print(cloud, f"{verdict:<11}{text}".split("\n"))

  try:
    check.check(settings, job.with_defaults(settings))
    report("ok", f"{job.config} and its flags")
    report(*check.check_memory(settings, job))
  except Failure as failure:
    report("WRONG", str(failure))
  if unsent := workers.count_unsent(settings):
    text = f"{unsent} files are changed, and are not sent\n  git commit --all"
    report("WRONG", text)
  for result in readiness.check_cloud(cloud, job):
    report(*result)
  _show_prices(cloud)
  return Exit.BAD_REQUEST if "WRONG" in results else Exit.DONE


def _show_prices(cloud: gcloud.Gcloud) -> None:
  for zone in cloud.settings.zones:
    logging.info("%s", cost.describe_hour(cloud.settings, zone))


def _reach_run(cloud: gcloud.Gcloud, arguments: argparse.Namespace) -> None:
  """Runs a verb that speaks to the supervisor and to the workers."""
  record = None
  try:
    record, _ = lease.read(cloud)
  except Failure as failure:
    logging.warning("The supervisor's record was not read: %s", failure)
  is_supervised = record is not None and record.exit_code is None
  verb, lines = arguments.verb, []
  if verb == "stop" and record and is_supervised:
    lease.put(cloud, lease.STOP, record.owner)
    logging.info("The supervisor will end within a minute or two.")
  elif verb == "logs" and record and arguments.worker is None:
    first = max(len(record.log) - arguments.lines, 0)
    lines = [f"[supervisor] {x}" for x in record.log[first:]]
  elif verb == "status" and record:
    lines = [str(record)]
  found = slices.find(cloud, assumed=slices.State.READY)
  if verb == "status":
    record = record or lease.Record("", "")
    record.note(cloud.zone, found.create_time)
    lines.append(cost.describe_total(cloud.settings, record.slices.values()))
    lines.append(f"{cloud.settings.name}: {found.state.value} in {cloud.zone}.")
  _print(cloud, lines)
  if found.state == slices.State.READY:
    _on_workers(cloud, arguments, found.num_workers)
  elif not is_supervised:
    raise found.failure(cloud.settings.name)


def _print(cloud: gcloud.Gcloud, lines: Sequence[str]) -> None:
  prefix = _DRY_RUN * cloud.dry_run
  sys.stdout.writelines(f"{prefix}{printable(line)}\n" for line in lines)
  sys.stdout.flush()


def _supervise(
  cloud: gcloud.Gcloud, job: workers.Job, arguments: argparse.Namespace
) -> int:
  _show_prices(cloud)
  if arguments.on_vm:
    validation.require(
      cloud.settings.bucket is not None,
      *("WORKDIR", cloud.settings.workdir, "be in a bucket for --on-vm"),
      "write gs://BUCKET/PATH, or go without --on-vm",
    )
    words = ["supervise", "--no-check", f"--timeout={arguments.timeout}"]
    words += [f"--poll={arguments.poll}", f"--pause={arguments.pause}"]
    words += [job.config, "--", *job.flags]
    vm.create(cloud, arguments.settings, words)
    return Exit.DONE
  try:
    has_record = cloud.settings.bucket and not cloud.dry_run
    context = lease.Lease(cloud) if has_record else contextlib.nullcontext()
    with context as held:
      seconds = (arguments.timeout, arguments.poll, arguments.pause)
      code = supervision.Supervisor(cloud, job, *seconds, held).supervise()
      logging.info("The run ended with exit code %d.", code)
      if held:
        held.record.exit_code = code
    if code == Exit.BAD_REQUEST:
      logging.info("`status` and `logs` say what the program refused.")
    return code
  finally:
    path = arguments.settings
    is_default = path == _parser().get_default("settings")
    option = [] if is_default else [f"--settings={path}"]
    logging.warning(
      "If %s exists, it costs money until you delete it: %s",
      cloud.settings.name,
      shlex.join(["bash", "launch/tpu.sh", *option, "delete"]),
    )


def _on_workers(
  cloud: gcloud.Gcloud, arguments: argparse.Namespace, count: int
) -> None:
  """Runs `status`, `logs` or `stop` on the workers of a ready slice."""
  if arguments.verb == "status":
    lines: list[str] = []
    for worker, status in enumerate(workers.status(cloud, count)):
      lines.append(f"worker {worker}: {status}")
      # The workers of a run say much the same.
      details = [f"  {line}" for line in status.details]
      lines += [line for line in details if line not in lines]
    _print(cloud, lines)
  elif arguments.verb == "stop":
    workers.stop(cloud, count, kill=arguments.kill)
    logging.info("The run has ended on all workers.")
  else:
    chosen = range(count)
    if (worker := arguments.worker) is not None:
      rule = f"be below the number of workers, {count}"
      words = ("--worker", worker, rule, "choose another")
      validation.require(worker < count, *words)
      chosen = [worker]
    workers.logs(cloud, chosen, arguments.lines, follow=arguments.follow)


def main(words: Sequence[str]) -> int:
  """Runs a verb; returns the exit code."""
  try:
    arguments = _parser().parse_args(words)
    prefix = _DRY_RUN * arguments.dry_run
    form = f"{prefix}%(message)s"
    logging.basicConfig(format=form, level=logging.INFO, force=True)
    return int(_run(arguments))
  except Failure as failure:
    code, message = failure.exit, str(failure)
  except (ValueError, FileNotFoundError) as error:
    code, message = Exit.BAD_REQUEST, str(error)
  except KeyboardInterrupt:
    code, message = Exit.INTERRUPTED, "Interrupted."
  logging.error("%s", printable(message, keep="\n"))
  logging.error("Exit code %d (%s). Next: %s", code, code.name, code.next_step)
  return int(code)


if __name__ == "__main__":
  exit_code = main(sys.argv[1:])
  if _ENDED in os.environ:
    pathlib.Path(os.environ[_ENDED]).write_text(f"{exit_code}\n")
  sys.exit(exit_code)
