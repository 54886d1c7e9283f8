"""A fake Python of a given version that records its calls.

    pretend_python.py ITSELF MAJOR.MINOR MISSING_MODULES ARGUMENT...

`-c CODE` runs as it would on that version. `-m venv` makes a venv of copies of
ITSELF. All else becomes a line of $CALLS, a list in JSON; then pip sleeps
($PIP=sleep), kills its caller ($PIP=kill) or writes down its settings
($PIP=tell), and the search for a TPU prints $TPU. At last it ends with the code
that $EXITS has for one of its words ("word=code word=code"), hangs if $HANGS is
one of them, or waits for Ctrl-C and ends with 75 if $SAVES is one of them.
"""

import json
import os
import pathlib
import shutil
import signal
import sys
import time


def run_code(itself: str, version: str, missing: str) -> None:
  """Runs the code as that version would."""
  sys.version = f"{version}.1"
  sys.version_info = (*map(int, version.split(".")), 1)
  sys._base_executable = itself
  sys.modules.update(dict.fromkeys(missing.split(",")))
  code = sys.argv.index("-c") + 1
  sys.argv[:] = ["-c", *sys.argv[code + 1 :]]
  exec(ORIGINAL[code], {"__name__": "__main__"})


def make_venv(itself: str, folder: pathlib.Path) -> None:
  """Acts like `python -m venv --clear`."""
  if folder.exists():
    shutil.rmtree(folder)
  (folder / "bin").mkdir(parents=True)
  shutil.copy(itself, folder / "bin" / "python")


def write_down(words: list[str]) -> None:
  with open(os.environ["CALLS"], "a", encoding="utf-8") as calls:
    calls.write(json.dumps(words) + "\n")


ORIGINAL = list(sys.argv)
_, itself, version, missing, *arguments = ORIGINAL
if "-c" in arguments:
  run_code(itself, version, missing)
  sys.exit()
write_down(arguments)
if arguments[:2] == ["-m", "venv"]:
  make_venv(itself, pathlib.Path(arguments[-1]))
if arguments[:2] == ["-m", "pip"]:
  what = os.environ.get("PIP", "")
  if what == "sleep":
    time.sleep(0.3)
  elif what == "kill":
    os.kill(os.getppid(), signal.SIGKILL)
  elif what == "tell":
    settings = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
    write_down(["settings of pip", *map("=".join, settings.items())])
if "grpo_tpu.distributed.tpu_host" in arguments:
  print(os.environ.get("TPU", "0 "))
for entry in os.environ.get("EXITS", "").split():
  word, _, code = entry.rpartition("=")
  if word in arguments:
    sys.exit(int(code))
if os.environ.get("SAVES") in arguments:
  signal.signal(signal.SIGINT, lambda *_: sys.exit(75))
  print("waiting for Ctrl-C", flush=True)
  time.sleep(60)
if os.environ.get("HANGS") in arguments:
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  time.sleep(60)
