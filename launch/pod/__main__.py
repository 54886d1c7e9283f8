"""The verbs of `launch/tpu.sh`.

launch/tpu.sh [--settings=FILE] [--dry-run] VERB ...
"""

import argparse
import json
import logging
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from launch.pod import (
  exits,
  gcloud,
  jobset,
  settings,
  slices,
  supervision,
  workers,
)

Exit = exits.Exit
_SETTINGS = workers.ROOT / "launch" / "tpu.env"


class _Parser(argparse.ArgumentParser):
  """One whose mistakes end with the project's code for them."""

  def error(self, message: str) -> NoReturn:
    self.print_usage(sys.stderr)
    self.exit(Exit.BAD_REQUEST, f"launch/tpu.sh: {message}.\n")


def _positive(text: str) -> float:
  value = float(text)
  if not 0 < value < float("inf"):
    raise argparse.ArgumentTypeError(f"{text} must be above 0")
  return value


def _number(text: str) -> int:
  value = int(text)
  if value < 0:
    raise argparse.ArgumentTypeError(f"{text} must be at least 0")
  return value


def _port(text: str) -> int:
  value = int(text)
  if not 0 < value < 2**16:
    raise argparse.ArgumentTypeError(f"{text} must be from 1 to 65535")
  return value


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog="launch/tpu.sh",
    description="A TPU slice and a run on it, from this machine.",
    epilog="docs/on-a-pod.md has the settings, the exit codes and the costs.",
    allow_abbrev=False,
  )
  parser.add_argument(
    *("--settings",), type=pathlib.Path, default=_SETTINGS, metavar="FILE",
    help="the settings, launch/tpu.env unless said",
  )  # fmt: skip
  parser.add_argument(
    "--dry-run",
    action="store_true",
    help="print every call of gcloud and make none",
  )
  verbs = parser.add_subparsers(
    dest="verb", required=True, metavar="VERB", parser_class=_Parser
  )

  def verb(name: str, words: str, epilog: str = "") -> argparse.ArgumentParser:
    made = verbs.add_parser(
      name, help=words, description=words, epilog=epilog, allow_abbrev=False
    )
    if name in ("wait", "supervise"):
      made.add_argument(
        *("--timeout",), type=_positive, default=24 * 3600.0, metavar="SECONDS",
        help="for the slice to come; a day unless said",
      )  # fmt: skip
      made.add_argument(
        *("--poll",), type=_positive, default=60.0, metavar="SECONDS",
        help="between two looks; 60 unless said",
      )  # fmt: skip
    if name == "supervise":
      made.add_argument(
        *("--pause",), type=_positive, default=30.0, metavar="SECONDS",
        help="before a restart, doubled each time; 30 unless said",
      )  # fmt: skip
    if name in ("run", "supervise", "jobset"):
      made.add_argument("config", metavar="CONFIG", help="configs/....py")
      made.add_argument(
        "flags", nargs="*", metavar="-- FLAG", help="more flags of the program"
      )
    return made

  verb("create", "ask for the slice, unless it is there")
  verb("wait", "until it is ready")
  verb("setup", "send the committed files, install the pinned set")
  verb("run", "start the program on every worker, and leave it")
  made = verb("logs", "the end of the workers' logs")
  made.add_argument("-w", "--worker", type=_number, help="of this one alone")
  made.add_argument("-f", "--follow", action="store_true", help="and go on")
  made.add_argument(
    "-n", "--lines", type=_number, default=50, help="of each; 50 unless said"
  )
  verb("status", "the slice, the processes, the last step and checkpoint")
  made = verb("stop", "have the run save and end")
  made.add_argument(
    "--kill", action="store_true", help="if it has not after GRACE_SECONDS"
  )
  verb("supervise", "all of it, and again whenever the slice is taken away")
  made = verb("tensorboard", "the curves, at a port of this machine")
  made.add_argument("--port", type=_port, default=6006, help="6006 unless said")
  verb("delete", "give the slice back: until then it costs")
  verb("jobset", "print the JobSet that does the same on GKE")
  return parser


def _run(arguments: argparse.Namespace) -> int:
  of = settings.read(arguments.settings)
  cloud = gcloud.Gcloud(of, dry_run=arguments.dry_run)
  verb = arguments.verb
  job = None
  if verb in ("run", "supervise", "jobset"):
    job = workers.Job(arguments.config, tuple(arguments.flags))
    if not of.image:
      workers.require_committed(job.config)
  if verb == "create":
    logging.info("%s", slices.create(cloud))
  elif verb == "delete":
    logging.info("%s", slices.delete(cloud))
  elif verb == "wait":
    found = slices.wait(
      cloud,
      timeout_seconds=arguments.timeout,
      poll_seconds=arguments.poll,
    )
    logging.info("%s is ready: %d workers.", of.name, found.num_workers)
  elif verb == "supervise" and job:
    patience = supervision.Patience(
      queue_seconds=arguments.timeout,
      poll_seconds=arguments.poll,
      pause_seconds=arguments.pause,
    )
    code = supervision.Supervisor(cloud, job, patience).supervise()
    logging.info("The run ended with exit code %d.", code)
    logging.info("The slice is still there, and costs until you `delete` it.")
    return code
  elif verb == "jobset" and job:
    text = json.dumps(jobset.manifest(of, job), indent=2)
    sys.stdout.write(text + "\n")
  elif verb == "status":
    return _status(cloud)
  else:
    _on_workers(cloud, arguments, job)
  return Exit.DONE


def _status(cloud: gcloud.Gcloud) -> int:
  found = slices.look(cloud, assumed=slices.Condition.READY)
  name = cloud.settings.name
  if found.condition != slices.Condition.READY:
    raise found.failure(name)
  sys.stdout.write(f"{name}: ready, {found.num_workers} workers.\n")
  statuses = workers.status(cloud, found.num_workers)
  for worker, status in enumerate(statuses):
    sys.stdout.write(f"worker {worker}: {status}\n")
  return Exit.DONE


def _on_workers(
  cloud: gcloud.Gcloud, arguments: argparse.Namespace, job: workers.Job | None
) -> None:
  """The verbs that need a slice that is ready, and nothing more."""
  count = slices.require_ready(cloud).num_workers
  verb = arguments.verb
  if verb == "setup":
    left = 0 if cloud.settings.image else workers.uncommitted()
    if left:
      logging.warning("%d files with uncommitted changes are not sent.", left)
    logging.info("%d workers have %s.", count, workers.setup(cloud, count))
  elif verb == "run" and job:
    workers.run(cloud, count, job)
    logging.info("Started on %d workers; `logs -f` shows them.", count)
  elif verb == "stop":
    workers.stop(cloud, count, kill=arguments.kill)
    logging.info("No run is going on any more.")
  elif verb == "logs":
    chosen = range(count)
    if arguments.worker is not None:
      if arguments.worker >= count:
        raise ValueError(
          f"--worker ({arguments.worker}) must be below {count}, the number of"
          " workers; choose another."
        )
      chosen = [arguments.worker]
    workers.logs(cloud, chosen, arguments.lines, follow=arguments.follow)
  elif verb == "tensorboard":
    port = arguments.port
    logging.info("http://localhost:%d in half a minute; Ctrl-C ends.", port)
    workers.tensorboard(cloud, port)


def main(words: Sequence[str]) -> int:
  """Does what the verb says; the exit code."""
  logging.basicConfig(format="%(message)s", level=logging.INFO)
  try:
    return int(_run(_parser().parse_args(words)))
  except exits.Failure as failure:
    kind, message = failure.exit, str(failure)
  except ValueError as error:
    kind, message = Exit.BAD_REQUEST, str(error)
  except KeyboardInterrupt:
    kind, message = Exit.INTERRUPTED, "Interrupted."
  logging.error("%s", message)
  logging.error(
    "launch/tpu.sh ends with %d, %s. Next: %s",
    *(kind, kind.name, exits.NEXT_STEP[kind]),
  )
  return kind


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
