"""A fake `python -m grpo_tpu.main` for the launcher.

It records its arguments, makes steps up to the number in $FAKE_CLOUD/step,
saves and exits with 75 on SIGTERM, and exits with the code in $FAKE_CLOUD/end.
Buckets are folders of $FAKE_CLOUD/buckets.
"""

import json
import os
import pathlib
import signal
import sys
import time

cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
worker = pathlib.Path(os.environ["FAKE_WORKER"]).name
flags = dict(
  word.removeprefix("--").split("=", 1)
  for word in sys.argv
  if word.startswith("--")
)
workdir = pathlib.Path(flags["workdir"].replace("gs://", f"{cloud}/buckets/"))
with open(cloud / "started", "a", encoding="utf-8") as started:
  said = {"worker": worker, "words": sys.argv[1:], "folder": os.getcwd()}
  said["environment"] = dict(os.environ)
  started.write(json.dumps(said) + "\n")
(workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
steps = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
step = max(steps, default=0)
sys.stdout.write(f"{worker} resumes from step {step}\n")
sys.stdout.flush()


def log(text: str) -> None:
  sys.stdout.write(f"I1130 08:26:58.744358 140 a.py:20] {text}\n")
  sys.stdout.flush()


def save() -> None:
  path = workdir / "checkpoints" / f"{step:08d}"
  path.mkdir(exist_ok=True)
  if worker == "127.0.0.10":
    log(f"Saved {path}.")


def preempted(*_: object) -> None:
  save()
  sys.exit(75)


signal.signal(signal.SIGTERM, preempted)
while not (cloud / "end").exists():
  if (cloud / "step").exists() and int((cloud / "step").read_text()) > step:
    step += 1
    if worker == "127.0.0.10":
      log(f"step {step}/99  reward 0.50")
    save()
  time.sleep(0.05)
sys.exit(int((cloud / "end").read_text()))
