"""Kills one run at random points, and compares it with one left alone.

    python tests/multihost/kill_anywhere.py [POINTS [SEED [FOLDER]]]

Each start goes on with the run that the one before it left, on two hosts, until
one of them is sent SIGKILL: as it samples, updates or saves, or up to a second
later. Prints a table, and exits with 1 if a number or a completion differs, or
fewer were killed than were to be.
"""

import pathlib
import random
import re
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from tests.multihost import pods  # noqa: E402

TOPOLOGY = pods.Topology(hosts=2, devices=1, fsdp=2, tensor=1)
POINTS = ("rollout", "update", "save")


def main(count: int = 20, seed: int = 0, folder: str = "") -> int:
  rng = random.Random(seed)
  place = pathlib.Path(folder or tempfile.mkdtemp())
  place.mkdir(parents=True, exist_ok=True)
  machine = pods.Machine(place, str(place / "compiled"))
  # Every second step is saved, and a start comes two steps further at most.
  settings = (f"--config.train.num_steps={2 * count + 2}",)
  whole = pods.Pod(machine, place / "whole", *settings).finish(TOPOLOGY)
  broken = pods.Pod(machine, place / "broken", *settings)
  reached = struck = 0
  for number in range(1, count + 1):
    point = rng.choice(POINTS)
    # A save is due at even steps; nothing is killed that is done already.
    step = reached - reached % 2 + (2 if point == "save" else rng.randint(1, 2))
    delay = f"{rng.uniform(0, 1):.2f}"
    fault = f"kill@{step}:{rng.randrange(2)}:{point}+{delay}"
    start, before = time.monotonic(), strikes(broken)
    code = broken.start(TOPOLOGY, fault)
    seconds = time.monotonic() - start
    struck += code != 0 and strikes(broken) > before
    saved = [
      int(path.name)
      for path in (broken.workdir / "checkpoints").iterdir()
      if re.fullmatch(r"\d{8}", path.name)
    ]
    reached = max(saved, default=0)  # Killed before anything was saved.
    print(
      f"{number:2} {fault:28} exit {code:3} "
      f"newest checkpoint {reached:2}  {seconds:5.1f} s",
      flush=True,
    )
  broken.finish(TOPOLOGY)
  same_numbers = broken.rows() == whole.rows()
  same_samples = broken.samples() == whole.samples()
  print(
    f"killed {struck} times; numbers equal: {same_numbers}; completions equal: "
    f"{same_samples}"
  )
  return 0 if same_numbers and same_samples and struck == count else 1


def strikes(pod: pods.Pod) -> int:
  """How many faults its hosts have written down."""
  logs = (pod.workdir / "logs").glob("host-*.log")
  return sum(log.read_text().count(" strikes\n") for log in logs)


if __name__ == "__main__":
  arguments = sys.argv[1:]
  sys.exit(main(*map(int, arguments[:2]), *arguments[2:3]))
