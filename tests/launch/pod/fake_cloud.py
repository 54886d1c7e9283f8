"""A TPU API on loopback, whose workers are folders of this machine.

gcloud is real. Fake `ssh` and `scp` on PATH run the remote command on this
machine, in the home folder of the worker. The program is `pretend_trainer.py`.
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
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from launch.pod import settings as pod_settings
from tests.gcs import fake

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
needs_gcloud = pytest.mark.skipif(
  not (shutil.which("gcloud") and shutil.which("ssh-keygen")),
  reason="no gcloud, or no ssh-keygen, on PATH",
)

# A value may follow its option as a word or be part of it.
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
# A worker's Python. Only the program is fake.
TRAINER = f"""#!/bin/bash
if [[ $2 == grpo_tpu.main ]]; then
  set -- -IS "{HERE}/pretend_trainer.py" "$@"
fi
exec "{sys.executable}" "$@"
"""
# The program's check of a command; refuses what the test tells it to.
CHECK = """import os, pathlib, sys

cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
if not os.path.samefile(os.getcwd(), os.environ["PYTHONPATH"]):
  sys.exit("CONFIG is read from another folder than the program")
with open(cloud / "checked", "a", encoding="utf-8") as checked:
  checked.write(repr(sys.argv[1:]) + "\\n")
if (cloud / "refusal").exists():
  sys.stderr.write((cloud / "refusal").read_text())
  sys.exit(64)
"""
SSH = f"""#!/bin/bash
exec "{sys.executable}" -IS "{HERE}/pretend_ssh.py" "$@"
"""


def eventually(claim, seconds: float = 300.0):
  """Waits until a claim is true; a busy machine is slow."""
  until = time.monotonic() + seconds
  while not (found := claim()):
    assert time.monotonic() < until, "the claim stayed false"
    time.sleep(0.1)
  return found


class Cloud:
  """The state of the API, and its requests.

  Attributes:
    folder: The folder of the workers and of the fake programs.
    requests: Method, path and body of each request that changes something.
    requested_states: The states of a queued resource at each request; the last
      one stays. ACTIVE makes the node.
    refusal: Code, status and message that refuse the next creation; or None.
    full_zones: Zones that refuse each creation for want of capacity.
    zones: The zone of each resource by name; europe-west4-b if it is not here.
    failure: The reason of a failed queued resource.
    num_workers: The number of workers of a node.
    looks: The number of requests about a node, without those of ssh.
    will_preempt: True takes the machines away at the next such request.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder = folder
    self.requests: list[tuple[str, str, dict[str, Any]]] = []
    self.requested_states = ["ACTIVE"]
    self.refusal: tuple[int, str, str] | None = None
    self.full_zones: set[str] = set()
    self.zones: dict[str, str] = {}
    self.failure = "the machines did not start"
    self.num_workers = 2
    self.looks = 0
    self.will_preempt = False
    self.nodes: dict[str, dict[str, Any]] = {}
    self.queued: dict[str, dict[str, Any]] = {}
    self.machines: dict[str, dict[str, Any]] = {}
    # What a project with everything answers, by the last part of the path.
    self.described: dict[str, dict[str, Any]] = {
      "services": {
        "services": [
          {"config": {"name": f"{name}.googleapis.com"}, "state": "ENABLED"}
          for name in ("compute", "storage", "tpu")
        ]
      },
      "consumerQuotaMetrics": {
        "metrics": [
          {
            "metric": "tpu.googleapis.com/tpu-v5s-litepod-preemptible",
            "consumerQuotaLimits": [
              {
                "quotaBuckets": [
                  {"effectiveLimit": "0"},
                  {
                    "effectiveLimit": "32",
                    "dimensions": {"zone": "europe-west4-b"},
                  },
                ]
              }
            ],
          }
        ]
      },
      "v5litepod-16": {"type": "v5litepod-16"},
      "v2-alpha-tpuv5-lite": {"version": "v2-alpha-tpuv5-lite"},
    }
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
    """Sets a number that all fake programs wait for, atomically."""
    unfinished = self.folder / f"{name}.new"
    unfinished.write_text(str(number))
    unfinished.replace(self.folder / name)

  def worker(self, number: int) -> pathlib.Path:
    """The home folder of a worker."""
    return self.folder / "workers" / f"127.0.0.{10 + number}"

  def add_node(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """Adds a TPU VM of this name, with empty machines."""
    first = len(self.nodes) * self.num_workers
    numbers = range(first, first + self.num_workers)
    for number in numbers:
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
        for number in numbers
      ],
    }
    return self.nodes[name]

  def take_away(self, name: str) -> None:
    """Preempts a slice: its machines vanish at once."""
    for node in self.nodes.values():
      node["state"] = "PREEMPTED"
    name = name if name in self.queued else name.rpartition("-")[0]
    self.queued[name]["state"] = {"state": "SUSPENDED"}
    self._remove_workers()

  def _remove_workers(self) -> None:
    self.kill_all()
    for worker in (self.folder / "workers").iterdir():
      shutil.rmtree(worker) if worker.is_dir() else worker.unlink()

  def processes(self) -> Iterator[psutil.Process]:
    """The processes on the workers."""
    mine = os.fspath(self.folder)
    for process in psutil.process_iter():
      with contextlib.suppress(psutil.Error):
        if process.environ().get("FAKE_WORKER", "").startswith(mine):
          yield process

  def kill_all(self) -> None:
    """Kills the processes on the workers."""
    for process in self.processes():
      with contextlib.suppress(psutil.Error):
        process.kill()

  def answer(
    self, method: str, url: str, body: dict[str, Any], agent: str
  ) -> tuple[int, dict[str, Any]]:
    """The status and the body; the agent names the command of gcloud."""
    parts = urllib.parse.urlsplit(url)
    query = dict(urllib.parse.parse_qsl(parts.query))
    *_, zone, kind, last = ["", "", "", *parts.path.split("/")]
    name, _, action = last.partition(":")
    if last in ("nodes", "queuedResources"):
      zone = kind
    with self._lock:
      if method != "GET" and action == "":
        self.requests.append((method, url, body))
      if last in self.described:
        return 200, self.described[last]
      if "/zones/" in parts.path:
        return self._answer_compute(method, last, body)
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
        if zone in self.full_zones:
          message = f"There is no more capacity in the zone {zone}."
          error = {"code": 429, "status": "RESOURCE_EXHAUSTED"}
          return 429, {"error": error | {"message": message}}
        if last == "nodes":
          self.zones[query["nodeId"]] = zone
          return 200, _done(self.add_node(query["nodeId"], body))
        name = query["queuedResourceId"]
        self.zones[name] = zone
        resource = f"projects/p/locations/z/queuedResources/{name}"
        self.queued[name] = body | {"name": resource, "looks": 0}
        return 200, _done(self.queued[name])
      held = self.nodes if kind == "nodes" else self.queued
      home = self.zones.get(name, "europe-west4-b")
      is_known = kind in ("nodes", "queuedResources") and name in held
      # Answers of this API call each zone z.
      if not is_known or zone not in (home, "z"):
        error = {"code": 404, "status": "NOT_FOUND", "message": f"no {last}"}
        return 404, {"error": error}
      if method == "DELETE":
        if "force" in query or kind == "nodes":
          for node in self._node_names(name):
            self.nodes.pop(node, None)
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

  def _answer_compute(
    self, method: str, last: str, body: dict[str, Any]
  ) -> tuple[int, dict[str, Any]]:
    """Makes, describes and deletes machines of Compute Engine."""
    operation = {"kind": "compute#operation", "name": "o", "status": "DONE"}
    link = "http://127.0.0.1/compute/v1/projects/my-project/zones/z/"
    operation |= {"selfLink": f"{link}operations/o", "zone": link[:-1]}
    operation["operationType"] = "delete" if method == "DELETE" else "insert"
    operation["targetLink"] = f"{link}instances/{last}"
    if last == "instances":
      operation["targetLink"] = f"{link}instances/{body['name']}"
      self.machines[body["name"]] = body | {"status": "RUNNING"}
      return 200, operation
    if last in ("o", "wait"):
      name = next(iter(self.machines), "none")
      return 200, operation | {"targetLink": f"{link}instances/{name}"}
    if last not in self.machines:
      return 404, {"error": {"code": 404, "message": f"{last} was not found"}}
    if method == "DELETE":
      del self.machines[last]
      return 200, operation
    return 200, self.machines[last]

  def _look(self, name: str) -> dict[str, Any]:
    """Describes a queued resource and moves it to its next state."""
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
    if state == "ACTIVE":
      for node in self._node_names(name):
        if node not in self.nodes:
          self.zones[node] = self.zones.get(name, "europe-west4-b")
          self.add_node(node, queued["tpu"]["nodeSpec"][0]["node"])
    return answer

  def _node_names(self, name: str) -> list[str]:
    """The TPU VMs of a queued resource; without one, the TPU VM."""
    specs = self.queued.get(name, {}).get("tpu", {}).get("nodeSpec", [{}])
    # Its name in the API's version v2, and in v2alpha1.
    several = specs[0].get("multisliceParams", specs[0].get("multiNodeParams"))
    if several is None:
      return [name]
    return [f"{name}-{k}" for k in range(several["nodeCount"])]


def _done(resource: dict[str, Any]) -> dict[str, Any]:
  response = {k: v for k, v in resource.items() if k != "looks"}
  name = "projects/p/locations/z/operations/o"
  return {"name": name, "done": True, "response": response}


@contextlib.contextmanager
def served(cloud: Cloud):
  """Serves the API; gives its port."""

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
  "MAX_RUN_DURATION": "",
  "RESERVATION": "",
  "NUM_SLICES": "1",
  "REQUEST": "queued",
  "VALID_FOR": "6h",
  "NETWORK": "default",
  "SUBNETWORK": "",
  "NETWORK_TAGS": "",
  "SSH": "external",
  "SERVICE_ACCOUNT": "",
  "LABELS": "",
  "BOOT_DISK": "",
  "AUTOCHECKPOINT": "no",
  "WORKDIR": "gs://my-bucket/runs/first",
  "IMAGE": "",
  "ENV": "",
  "MAX_RESTARTS": "3",
  "GRACE_SECONDS": "20",
  "KUBERNETES_NAMESPACE": "default",
  "KUBERNETES_SERVICE_ACCOUNT": "default",
}


def settings(**changes: str) -> pod_settings.Settings:
  """Valid settings, with these changes."""
  values = SETTINGS | changes
  return pod_settings.Settings(**{k.lower(): v for k, v in values.items()})


class Laptop:
  """A checkout with one commit, its settings, and gcloud logged in.

  Attributes:
    checkout: The checkout, with blanks in its name and in that of a config.
    environment: The environment of every call.
    settings: The content of the settings file.
    token: The secret token of the login.
  """

  def __init__(
    self, folder: pathlib.Path, cloud: Cloud, port: int, store: fake.Server
  ):
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
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_SERVICEUSAGE": f"{url}/",
      "CLOUDSDK_API_ENDPOINT_OVERRIDES_STORAGE": f"{store.url}/storage/v1/",
    }
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "launch", self.checkout / "launch", ignore=ignore)
    for name in (
      *("grpo_tpu/__init__.py", "grpo_tpu/distributed/__init__.py"),
      *("grpo_tpu/distributed/hardware.py", "data_pipelines/__init__.py"),
      *("grpo_tpu/distributed/hardware.toml", "data_pipelines/validation.py"),
    ):
      (self.checkout / name).parent.mkdir(exist_ok=True)
      shutil.copy(ROOT / name, self.checkout / name)
    (self.checkout / "grpo_tpu" / "planning").mkdir()
    (self.checkout / "grpo_tpu" / "planning" / "check.py").write_text(CHECK)
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
    """Starts `launch/tpu.sh` outside the checkout."""
    lines = [
      f"{name}={line}\n"
      for name, value in self.settings.items()
      for line in value.split("\n")
    ]
    path = self.checkout / "launch" / "tpu.env"
    path.write_text("".join(lines))
    # Ctrl-C and a hang-up reach the script, even if the tests ignore them.
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
    """Runs `launch/tpu.sh`."""
    process = self.start(*words)
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(words, process.returncode, out, err)
