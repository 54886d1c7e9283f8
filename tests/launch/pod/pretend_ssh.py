"""A fake ssh for gcloud: a worker is a folder.

Two events on the laptop reach a worker: nobody reads its output any more, and
its terminal, if it has one, hangs up.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from typing import IO

words = sys.argv[1:]
# A value may follow its option as a word or be part of it.
at = next(i for i, word in enumerate(words) if "@127." in word)
cloud, name = os.environ["FAKE_CLOUD"], words[at].split("@")[1]
worker = os.path.join(cloud, "workers", name)
end = words.index("--", at)
if not os.path.isdir(worker) or os.path.exists(f"{worker}.cut"):
  sys.stderr.write("ssh: connect to host port 22: Connection timed out\n")
  sys.exit(255)
environment = {
  key: value
  for key, value in os.environ.items()
  if not key.startswith("CLOUDSDK")
}
remote = subprocess.Popen(
  ["bash", "-c", " ".join(words[end + 1 :])],
  cwd=worker,
  env=environment
  | {
    "HOME": worker,
    "HOSTNAME": name,
    "FAKE_WORKER": worker,
    "GRPO_TPU_PYTHON": os.path.join(cloud, "trainer"),
  },
  start_new_session=True,
  stdout=subprocess.PIPE,
  stderr=subprocess.PIPE,
)


def hang_up(*_: object) -> None:
  if "-tt" in words[:end]:
    os.killpg(remote.pid, signal.SIGHUP)
  os._exit(255)


def relay(source: IO[bytes], target: int) -> None:
  while data := os.read(source.fileno(), 1 << 16):
    os.write(target, data)


# gcloud ends its ssh when it is interrupted.
for number in (signal.SIGINT, signal.SIGTERM):
  signal.signal(number, hang_up)
threads = [
  threading.Thread(target=relay, args=pair, daemon=True)
  for pair in ((remote.stdout, 1), (remote.stderr, 2))
]
for thread in threads:
  thread.start()
# A signal to another thread does not wake a waiting thread.
while remote.poll() is None:
  time.sleep(0.02)
for thread in threads:
  thread.join()
sys.exit(remote.returncode)
