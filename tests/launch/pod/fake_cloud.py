"""A TPU API on the loopback, and workers that are folders of this machine.

gcloud itself is real. Its `ssh` and `scp` are stand-ins on PATH that run the
remote command in a shell of this machine, in the home folder of the worker
whose address they were given. The program is `pretend_trainer.py`.
"""

import base64
import contextlib
import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import psutil

from launch.pod import settings as pod_settings

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]

# Options take a word of their own, or are one with it.
SCP = """#!/bin/bash
files=()
while (($# > 1)); do
  case $1 in
    -[iPoF]) shift ;;
    -*) ;;
    *) files+=("$1") ;;
  esac
  shift
done
worker=$FAKE_CLOUD/workers/${1#*@}
worker=${worker%:.}
if [[ ! -d $worker || -e $worker.cut ]]; then
  echo "scp: Connection closed" >&2
  exit 255
fi
exec cp -- "${files[@]}" "$worker"
"""
# A worker's Python: all of it but the program is real.
TRAINER = f"""#!/bin/bash
if [[ $2 == grpo_tpu.main ]]; then
  set -- -IS "{HERE}/pretend_trainer.py" "$@"
fi
exec "{sys.executable}" "$@"
"""
SSH = f"""#!/bin/bash
exec "{sys.executable}" -IS "{HERE}/pretend_ssh.py" "$@"
"""


class Cloud:
  """The API's state, and what has been asked of it.

  Attributes:
    folder: Of the workers, and of what stands in for their programs.
    requests: Method, path and body of each that changes something.
    requested_states: Of a queued resource, at each look, the last for good;
      ACTIVE makes the node.
    refusal: Status and message of the next creation, if it is to be refused.
    failure: What a queued resource says of its failure.
    num_workers: Of a node.
    looks: How often someone who is not ssh has asked about a node.
    will_preempt: Whether the next to ask about a node, not ssh, finds its
      machines taken away.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.requests: list[tuple[str, str, dict[str, Any]]] = []
    self.requested_states = ["ACTIVE"]
    self.refusal: tuple[int, str, str] | None = None
    self.failure = "the machines did not start"
    self.num_workers = 2
    self.looks = 0
    self.will_preempt = False
    self.nodes: dict[str, dict[str, Any]] = {}
    self.queued: dict[str, dict[str, Any]] = {}
    self._lock = threading.Lock()
    (folder / "workers").mkdir(parents=True)
    (folder / "bin").mkdir()
    self._add("bin/ssh", SSH)
    self._add("bin/scp", SCP)
    self._add("trainer", TRAINER)

  def _add(self, name: str, script: str) -> None:
    (self.folder / name).write_text(script)
    (self.folder / name).chmod(0o755)

  def tell(self, name: str, number: int) -> None:
    """Tells the programs what `pretend_trainer.py` waits for, all at once."""
    unfinished = self.folder / f"{name}.new"
    unfinished.write_text(str(number))
    unfinished.replace(self.folder / name)

  def worker(self, number: int) -> pathlib.Path:
    """The home folder of a worker."""
    return self.folder / "workers" / f"127.0.0.{10 + number}"

  def add_node(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """A TPU VM of this name, with machines that have nothing on them yet."""
    for number in range(self.num_workers):
      self.worker(number).mkdir(exist_ok=True)
    self.nodes[name] = body | {
      "name": f"projects/p/locations/z/nodes/{name}",
      "id": "7",
      "state": "READY",
      "health": "HEALTHY",
      "apiVersion": "V2",
      "networkEndpoints": [
        {
          "ipAddress": f"10.0.0.{number}",
          "accessConfig": {"externalIp": self.worker(number).name},
        }
        for number in range(self.num_workers)
      ],
    }
    return self.nodes[name]

  def take_away(self, name: str) -> None:
    """What a preemption does: the machines are gone, at once."""
    self.nodes[name]["state"] = "PREEMPTED"
    self.queued[name]["state"] = {"state": "SUSPENDED"}
    self._remove_workers()

  def _remove_workers(self) -> None:
    self.kill_all()
    for worker in (self.folder / "workers").iterdir():
      shutil.rmtree(worker) if worker.is_dir() else worker.unlink()

  def processes(self) -> Iterator[psutil.Process]:
    """Whatever runs on the workers."""
    mine = os.fspath(self.folder)
    for process in psutil.process_iter():
      with contextlib.suppress(psutil.Error):
        if process.environ().get("FAKE_WORKER", "").startswith(mine):
          yield process

  def kill_all(self) -> None:
    """Ends all of it."""
    for process in self.processes():
      with contextlib.suppress(psutil.Error):
        process.kill()

  def answer(
    self, method: str, url: str, body: dict[str, Any], agent: str
  ) -> tuple[int, dict[str, Any]]:
    """Status and body; the agent names the command of gcloud."""
    parts = urllib.parse.urlsplit(url)
    query = dict(urllib.parse.parse_qsl(parts.query))
    *_, kind, last = parts.path.split("/")
    name, _, action = last.partition(":")
    with self._lock:
      if method != "GET" and action == "":
        self.requests.append((method, url, body))
      if parts.path.startswith("/compute/"):
        fingerprint = base64.b64encode(b"1").decode()
        metadata = {"fingerprint": fingerprint, "items": []}
        return 200, {"name": "p", "commonInstanceMetadata": metadata}
      if action == "getGuestAttributes":
        item = {"key": "ssh-ed25519", "value": "AAAAsuffix"}
        return 200, {"guestAttributes": [{"queryValue": {"items": [item]}}]}
      if kind == "operations":
        name = next(iter(self.nodes), "none")
        return 200, _done({"name": f"projects/p/locations/z/nodes/{name}"})
      if method == "POST":
        if self.refusal:
          code, status, message = self.refusal
          error = {"code": code, "status": status, "message": message}
          return code, {"error": error}
        if last == "nodes":
          return 200, _done(self.add_node(query["nodeId"], body))
        name = query["queuedResourceId"]
        resource = f"projects/p/locations/z/queuedResources/{name}"
        self.queued[name] = body | {"name": resource, "looks": 0}
        return 200, _done(self.queued[name])
      held = self.nodes if kind == "nodes" else self.queued
      if kind not in ("nodes", "queuedResources") or name not in held:
        error = {"code": 404, "status": "NOT_FOUND", "message": f"no {last}"}
        return 404, {"error": error}
      if method == "DELETE":
        if "force" in query or kind == "nodes":
          self.nodes.pop(name, None)
          self._remove_workers()
        return 200, _done(held.pop(name, {}))
      if kind == "nodes" and "describe" in agent:
        self.looks += 1
        if self.will_preempt:
          self.will_preempt = False
          self.take_away(name)
      if method == "PATCH":
        held[name] |= body
        return 200, _done(held[name])
      return 200, held[name] if kind == "nodes" else self._look(name)

  def _look(self, name: str) -> dict[str, Any]:
    """A queued resource, which gets further whenever it is looked at."""
    queued = self.queued[name]
    if queued.get("state", {}).get("state") == "SUSPENDED":
      return queued
    looks = queued.pop("looks")
    states = self.requested_states
    state = states[min(looks, len(states) - 1)]
    queued["state"] = {"state": state}
    if state == "FAILED":
      queued["state"]["failedData"] = {"error": {"message": self.failure}}
    answer = dict(queued)
    queued["looks"] = looks + 1
    if state == "ACTIVE" and name not in self.nodes:
      self.add_node(name, queued["tpu"]["nodeSpec"][0]["node"])
    return answer


def _done(resource: dict[str, Any]) -> dict[str, Any]:
  response = {k: v for k, v in resource.items() if k != "looks"}
  name = "projects/p/locations/z/operations/o"
  return {"name": name, "done": True, "response": response}


@contextlib.contextmanager
def served(cloud: Cloud):
  """The port at which the API answers."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def _do(self) -> None:
      length = int(self.headers.get("Content-Length") or 0)
      body = json.loads(self.rfile.read(length) or b"{}")
      status, answer = cloud.answer(
        self.command, self.path, body, self.headers["User-Agent"]
      )
      text = json.dumps(answer).encode()
      self.send_response(status)
      self.send_header("Content-Type", "application/json")
      self.send_header("Content-Length", str(len(text)))
      self.end_headers()
      self.wfile.write(text)

    do_GET = do_POST = do_PATCH = do_DELETE = _do

    def log_message(self, format: str, *args: Any) -> None:
      del format, args

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield server.server_port
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
    cloud.kill_all()


SETTINGS = {
  "PROJECT": "my-project",
  "ZONE": "europe-west4-b",
  "NAME": "grpo-1",
  "ACCELERATOR_TYPE": "v5litepod-16",
  "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
  "CAPACITY": "spot",
  "REQUEST": "queued",
  "VALID_FOR": "6h",
  "NETWORK": "default",
  "SUBNETWORK": "",
  "SSH": "external",
  "SERVICE_ACCOUNT": "",
  "LABELS": "",
  "WORKDIR": "gs://my-bucket/runs/first",
  "IMAGE": "",
  "MAX_RESTARTS": "3",
  "GRACE_SECONDS": "20",
  "KUBERNETES_NAMESPACE": "default",
  "KUBERNETES_SERVICE_ACCOUNT": "default",
}


def settings(**changes: str) -> pod_settings.Settings:
  """Good ones, but for these."""
  values = SETTINGS | changes
  return pod_settings.Settings(**{k.lower(): v for k, v in values.items()})


class Laptop:
  """A checkout with one commit, its settings, and gcloud logged in.

  Attributes:
    checkout: With blanks in its name, and a config with one in its own.
    environment: Of every call.
    settings: Of the settings file that `tpu` writes.
    token: The secret of the login.
  """

  def __init__(self, folder: pathlib.Path, cloud: Cloud, port: int):
    self.checkout = folder / "a checkout"
    self.home = folder / "home"
    self.home.mkdir()
    self.settings = dict(SETTINGS)
    self.token = "ya29.a-secret-token"
    token = folder / "token"
    token.write_text(self.token)
    url = f"http://127.0.0.1:{port}"
    self.environment = {
      "PATH": f"{cloud.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
      "HOME": str(self.home),
      "USER": "someone",
      "LOGNAME": "someone",
      "GRPO_TPU_PYTHON": sys.executable,
      "FAKE_CLOUD": str(cloud.folder),
      "CLOUDSDK_CONFIG": str(folder / "gcloud"),
      "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(token),
      "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
      "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{url}/",
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{url}/compute/v1/",
    }
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "launch", self.checkout / "launch", ignore=ignore)
    for name in (
      *("grpo_tpu/__init__.py", "grpo_tpu/distributed/__init__.py"),
      *("grpo_tpu/distributed/hardware.py", "data_pipelines/__init__.py"),
      "data_pipelines/validation.py",
    ):
      (self.checkout / name).parent.mkdir(exist_ok=True)
      shutil.copy(ROOT / name, self.checkout / name)
    (self.checkout / "configs").mkdir()
    (self.checkout / "configs" / "my config.py").write_text('"""Mine."""\n')
    (self.checkout / ".gitignore").write_text("launch/tpu.env\n")
    self.git("init", "--quiet")
    self.git("add", "--all")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    self.git(*author, "commit", "--quiet", "--message=All")

  def git(self, *words: str) -> str:
    return subprocess.run(
      ["git", *words],
      cwd=self.checkout,
      env=self.environment,
      check=True,
      capture_output=True,
      text=True,
    ).stdout.strip()

  def start(self, *words: str) -> subprocess.Popen[str]:
    """Starts `launch/tpu.sh` where nothing of ours is."""
    lines = [f"{name}={value}\n" for name, value in self.settings.items()]
    path = self.checkout / "launch" / "tpu.env"
    path.write_text("".join(lines))
    # Ctrl-C and a hang-up reach it, even where the tests do not hear them.
    heard = [shutil.which("env") or "env", "--default-signal=INT,HUP"]
    return subprocess.Popen(
      [*heard, "bash", str(self.checkout / "launch" / "tpu.sh"), *words],
      cwd=self.home,
      env=self.environment,
      start_new_session=True,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )

  def tpu(self, *words: str) -> subprocess.CompletedProcess[str]:
    """The same, waited for."""
    process = self.start(*words)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(words, process.returncode, out, err)
