"""A bucket on the loopback interface: the parts of GCS's JSON API that we use.

Speaks what TensorStore, google-cloud-storage and TensorFlow send: media,
multipart and resumable uploads, ranges, listings, preconditions, copies,
rewrites and compositions. TensorFlow knows no other server than Google's, but
obeys `HTTPS_PROXY`: the fake is that proxy too, see `tests/gcs/proxy.py`.
Buckets need not be made, but there is none whose name begins with `no-such`,
and none may read or write one whose name begins with `forbidden`. Objects
outlive the programs that wrote them. How requests fail is set by `Faults`, or
by a PUT of its fields to /faults.

    python -m tests.gcs.fake --folder=DIR

prints what leads the programs of a shell to it, and serves until Ctrl-C.

References:
  https://cloud.google.com/storage/docs/json_api/v1
"""

import argparse
import base64
import dataclasses
import datetime
import functools
import hashlib
import http.server
import itertools
import json
import mmap
import pathlib
import random
import re
import shlex
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable
from typing import Any

import google_crc32c

from tests.gcs import proxy

_API = "/storage/v1/b/([^/]+)"


# Larger objects are kept in the folder, if there is one.
_LARGE = 1 << 20
_CHUNK = 1 << 22


@dataclasses.dataclass
class Faults:
  """How the bucket fails.

  Attributes:
    busy: Share of requests that are answered 503 or 429, half of each.
    cut: Share of connections that end without an answer, half of them before
      the request is carried out; or in the middle of an object that is read.
    delay: Seconds before an answer.
    slow: Share of answers that are delayed.
    outage: True while no request is answered.
    quota: Bytes in all buckets above which an object is refused.
    seed: Of the order in which faults fall.
  """

  busy: float = 0.0
  cut: float = 0.0
  delay: float = 0.0
  slow: float = 1.0
  outage: bool = False
  quota: float = float("inf")
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Blob:
  """An object: its bytes, generation and content type."""

  data: bytes | memoryview
  generation: int
  content_type: str
  updated: str

  @functools.cached_property
  def crc32c(self) -> str:
    """The checksum, as the API writes it."""
    crc, view = 0, memoryview(self.data)
    for start in range(0, len(view), _CHUNK):
      crc = google_crc32c.extend(crc, bytes(view[start : start + _CHUNK]))
    return base64.b64encode(crc.to_bytes(4, "big")).decode()

  @functools.cached_property
  def md5(self) -> str:
    """The digest that gcloud compares; empty for large objects."""
    if len(self.data) > 1 << 24:
      return ""
    digest = hashlib.md5(bytes(self.data), usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()

  def describe(self, bucket: str, name: str) -> dict[str, Any]:
    """The resource that the API returns."""
    resource = {"md5Hash": self.md5} if self.md5 else {}
    path = f"{bucket}/o/{urllib.parse.quote(name, safe='')}"
    return resource | {
      "kind": "storage#object",
      "id": f"{bucket}/{name}/{self.generation}",
      "bucket": bucket,
      "name": name,
      "size": str(len(self.data)),
      "generation": str(self.generation),
      "metageneration": "1",
      "contentType": self.content_type,
      "updated": self.updated,
      "timeCreated": self.updated,
      "crc32c": self.crc32c,
      "etag": f"{self.generation}",
      "storageClass": "STANDARD",
      # gcloud downloads from there.
      "mediaLink": f"/download/storage/v1/b/{path}"
      f"?generation={self.generation}&alt=media",
    }


@dataclasses.dataclass
class Upload:
  """A resumable upload, and the pieces of it that have come."""

  bucket: str
  name: str
  kind: str
  query: dict[str, str]
  pieces: list[bytes | memoryview] = dataclasses.field(default_factory=list)

  @property
  def size(self) -> int:
    return sum(map(len, self.pieces))


class Refused(Exception):
  """An answer that is no success."""

  def __init__(self, status: int, reason: str, word: str = ""):
    super().__init__(reason)
    self.status, self.reason, self.word = status, reason, word


class Bucket:
  """All buckets of the fake, and what was asked of it.

  Attributes:
    faults: How requests fail from now on.
    objects: What there is, by bucket and name.
    requests: Each request that has come, in order: "PUT /upload/...".
    puts: How many objects have been stored.
  """

  def __init__(self, folder: pathlib.Path | None = None) -> None:
    """Keeps objects in memory, large ones in files of the folder."""
    self.faults = Faults()
    self.objects: dict[tuple[str, str], Blob] = {}
    self.requests: list[str] = []
    self.puts = 0
    self.lock = threading.RLock()
    self._folder = folder
    self._uploads: dict[str, Upload] = {}
    self._callbacks: dict[int, Callable[[], None]] = {}
    self._generations = itertools.count(time.time_ns() // 1000)
    self._random = random.Random(0)

  def set_faults(self, **fields: Any) -> None:
    self.faults = Faults(**fields)
    self._random = random.Random(self.faults.seed)

  def at_put(self, number: int, callback: Callable[[], None]) -> None:
    """Calls it once so many more objects are stored, none of them answered."""
    with self.lock:
      self._callbacks[self.puts + number] = callback

  def draw(self) -> tuple[float, float, float]:
    """Numbers in [0, 1), which decide how a request fails."""
    with self.lock:
      one = self._random.random
      return one(), one(), one()

  def room(self, size: int) -> bytearray | memoryview:
    """Where so many bytes can be received: in memory, or in a file."""
    if self._folder is None or size < _LARGE:
      return bytearray(size)
    with tempfile.TemporaryFile(dir=self._folder) as file:
      file.truncate(size)
      return memoryview(mmap.mmap(file.fileno(), size))

  def names(self, bucket: str, prefix: str = "") -> list[str]:
    """The names of a bucket's objects, in order."""
    with self.lock:
      mine = [name for own, name in self.objects if own == bucket]
    return sorted(name for name in mine if name.startswith(prefix))

  def put(
    self,
    bucket: str,
    name: str,
    data: bytes | memoryview,
    kind: str,
    query: dict[str, str],
  ) -> dict[str, Any]:
    """Stores an object whole, if the preconditions hold."""
    if not name or len(name.encode()) > 1024 or set(name) & set("\r\n"):
      raise Refused(400, "Invalid object name.", "invalid")
    with self.lock:
      self._check(self.objects.get((bucket, name)), query)
      held = sum(len(blob.data) for blob in self.objects.values())
      if held + len(data) > self.faults.quota:
        raise Refused(403, "The storage quota is exceeded.", "quotaExceeded")
      now = datetime.datetime.now(datetime.UTC).strftime("%FT%T.%fZ")
      blob = Blob(data, next(self._generations), kind, now)
      self.objects[bucket, name] = blob
      self.puts += 1
      callback = self._callbacks.pop(self.puts, None)
    if callback:
      callback()
    return blob.describe(bucket, name)

  def find(self, bucket: str, name: str, generation: str | None = None) -> Blob:
    """The object, of this generation if one is given."""
    blob = self.objects.get((bucket, name))
    if blob is None or generation not in (None, str(blob.generation)):
      raise Refused(404, f"No such object: {bucket}/{name}", "notFound")
    return blob

  def get(self, bucket: str, name: str, query: dict[str, str]) -> Blob | None:
    """The object; none if it is the one that the client has already."""
    blob = self.find(bucket, name, query.get("generation"))
    if query.get("ifGenerationNotMatch") == str(blob.generation):
      return None
    self._check(blob, query)
    return blob

  def delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
    with self.lock:
      if self.get(bucket, name, query) is None:
        raise Refused(412, "The generation is that one.", "conditionNotMet")
      del self.objects[bucket, name]

  def list_objects(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
    """A page of a listing, with `prefix`, `delimiter` and page tokens."""
    if "matchGlob" in query:
      raise Refused(400, "The fake has no matchGlob.", "invalid")
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    start, end = query.get("startOffset", ""), query.get("endOffset", "")
    limit = int(query.get("maxResults", "1000"))
    token = query.get("pageToken", "")
    items: list[dict[str, Any]] = []
    prefixes: set[str] = set()
    last = ""
    for name in self.names(bucket, prefix):
      if name < start or (end and name >= end) or (token and name <= token):
        continue
      rest = name[len(prefix) :]
      folder = (
        prefix + rest.split(delimiter)[0] + delimiter if delimiter else ""
      )
      if folder in prefixes:
        continue
      if len(items) + len(prefixes) >= limit:
        return self._page(items, prefixes) | {"nextPageToken": last}
      if delimiter and delimiter in rest:
        prefixes.add(folder)
        last = folder + "\U0010ffff"
      elif blob := self.objects.get((bucket, name)):
        items.append(blob.describe(bucket, name))
        last = name
    return self._page(items, prefixes)

  def start_upload(self, upload: Upload) -> str:
    with self.lock:
      key = f"u{len(self._uploads)}"
      self._uploads[key] = upload
    return key

  def find_upload(self, key: str) -> Upload:
    if key not in self._uploads:
      raise Refused(404, "No such upload.", "notFound")
    return self._uploads[key]

  @staticmethod
  def _page(items: list, prefixes: set[str]) -> dict[str, Any]:
    page: dict[str, Any] = {"kind": "storage#objects"}
    if items:
      page["items"] = items
    if prefixes:
      page["prefixes"] = sorted(prefixes)
    return page

  @staticmethod
  def _check(blob: Blob | None, query: dict[str, str]) -> None:
    """Refuses a change of an object that is not of the wanted generation."""
    generation = str(blob.generation if blob else 0)
    wanted = query.get("ifGenerationMatch", generation)
    if wanted != generation or query.get("ifGenerationNotMatch") == generation:
      reason = "At least one of the pre-conditions did not hold."
      raise Refused(412, reason, "conditionNotMet")


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers one connection."""

  protocol_version = "HTTP/1.1"
  # An answer waits for no acknowledgement of the one before.
  disable_nagle_algorithm = True
  store: Bucket
  tunnel: proxy.Tunnel
  _cut = False

  def do_CONNECT(self) -> None:
    """Becomes one of Google's hosts, for the rest of the connection."""
    if self.path.rpartition(":")[0] not in proxy.HOSTS:
      self._answer(403, b"")
      return
    self.connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    self.connection = self.request = self.tunnel.wrap(self.connection)
    self.rfile = self.connection.makefile("rb")
    self.wfile = self.connection.makefile("wb", 0)
    self.close_connection = False

  def finish(self) -> None:
    super().finish()
    self.connection.close()

  def _serve(self) -> None:
    parts = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    body, store = self._body(), self.store
    faults = store.faults
    if parts.path == "/faults":
      store.set_faults(**json.loads(bytes(body) or b"{}"))
      return self._answer(200, b"{}")
    with store.lock:
      store.requests.append(f"{self.command} {self.path}")
    if faults.outage:
      self.close_connection = True
      return None
    busy, cut, slow = store.draw()
    if slow < faults.slow:
      time.sleep(faults.delay)
    if busy < faults.busy:
      status = 503 if busy < faults.busy / 2 else 429
      return self._error(Refused(status, "Try again later.", "backendError"))
    if cut < faults.cut / 2:
      self.close_connection = True
      return None
    self._cut = cut < faults.cut
    try:
      return self._route(parts.path, query, body)
    except Refused as error:
      return self._error(error)

  do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = do_HEAD = _serve

  def _route(self, path: str, query: dict[str, str], body: Any) -> None:
    # JSON's uploads, objects and buckets; the XML API's reads of TensorFlow.
    for pattern, answer in (
      (r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", self._upload),
      (r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", self._object),
      (r"/storage/v1/b/([^/]+)(/o|/storageLayout)?/?", self._bucket),
      (r"/([^/]+)/(.+)", self._object),
    ):
      if match := re.fullmatch(pattern, path):
        bucket, *rest = match.groups()
        if bucket.startswith("no-such"):
          raise Refused(404, "The bucket does not exist.", "notFound")
        if bucket.startswith("forbidden"):
          reason = f"Permission storage.objects denied on bucket {bucket}."
          raise Refused(403, reason, "forbidden")
        if "/v1/b/" not in path:
          query = {"alt": "media"}
        return answer(bucket, *rest, query=query, body=body)
    raise Refused(404, f"The fake has no {self.command} {path}", "notFound")

  def _bucket(
    self, bucket: str, rest: str | None, query: dict[str, str], body: Any
  ) -> None:
    if self.command not in ("GET", "HEAD"):
      raise Refused(405, f"The fake has no {self.command} of buckets.")
    if rest == "/o":
      return self._json(self.store.list_objects(bucket, query))
    made: dict[str, Any] = {"name": bucket, "id": bucket, "location": "EU"}
    if rest:
      layout: dict[str, Any] = {
        "kind": "storage#storageLayout",
        "bucket": bucket,
      }
      layout["hierarchicalNamespace"] = {"enabled": False}
      return self._json(made | layout)
    made |= {"kind": "storage#bucket", "timeCreated": "2026-01-01T00:00:00Z"}
    return self._json(made)

  def _object(
    self, bucket: str, rest: str, query: dict[str, str], body: Any
  ) -> None:
    store, unquote = self.store, urllib.parse.unquote
    if self.command == "POST":
      return self._copy(bucket, rest, query, body)
    if self.command not in ("GET", "HEAD", "DELETE"):
      raise Refused(405, f"The fake has no {self.command} of objects.")
    name = unquote(rest)
    if self.command == "DELETE":
      store.delete(bucket, name, query)
      return self._answer(204, b"")
    blob = store.get(bucket, name, query)
    if blob is None:
      return self._answer(304, b"")
    if query.get("alt") == "media":
      return self._media(blob)
    return self._json(blob.describe(bucket, name))

  def _copy(
    self, bucket: str, rest: str, query: dict[str, str], body: Any
  ) -> None:
    """Copies an object, or composes one of several."""
    store, unquote = self.store, urllib.parse.unquote
    if match := re.fullmatch(r"(.+)/compose", rest):
      asked = json.loads(bytes(body))
      names = [x["name"] for x in asked["sourceObjects"]]
      if len(names) > 32:
        raise Refused(400, "More than 32 objects.", "invalid")
      data = b"".join(store.find(bucket, name).data for name in names)
      kind = asked.get("destination", {}).get("contentType", "text/plain")
      return self._json(store.put(bucket, unquote(match[1]), data, kind, query))
    match = re.fullmatch(r"(.+)/(rewriteTo|copyTo)/b/([^/]+)/o/(.+)", rest)
    if not match:
      raise Refused(404, f"The fake has no POST {rest}", "notFound")
    generation = query.get("sourceGeneration")
    blob = store.find(bucket, unquote(match[1]), generation)
    there = unquote(match[4])
    made = store.put(match[3], there, blob.data, blob.content_type, query)
    if match[2] == "copyTo":
      return self._json(made)
    size = str(len(blob.data))
    moved = {"kind": "storage#rewriteResponse", "done": True, "resource": made}
    return self._json(moved | {"objectSize": size, "totalBytesRewritten": size})

  def _media(self, blob: Blob) -> None:
    data, status, headers = memoryview(blob.data), 200, {}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if asked:
      size = len(data)
      if asked[1]:
        start, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
      else:
        start, end = max(0, size - int(asked[2])), size - 1
      if start >= size or start > end:
        raise Refused(416, "The range holds no byte.")
      data, status = data[start : end + 1], 206
      headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    headers["X-Goog-Generation"] = str(blob.generation)
    headers["X-Goog-Hash"] = f"crc32c={blob.crc32c}"
    headers["Content-Type"] = blob.content_type
    self._answer(status, data, headers)

  def _upload(self, bucket: str, query: dict[str, str], body: Any) -> None:
    store = self.store
    kind = self.headers.get("Content-Type", "application/octet-stream")
    if query.get("uploadType") == "multipart":
      described, kind, body = _split_multipart(kind, body)
      name = query.get("name") or described["name"]
      return self._json(store.put(bucket, name, body, kind, query))
    if query.get("uploadType") != "resumable":
      name = query.get("name", "")
      return self._json(store.put(bucket, name, body, kind, query))
    if "upload_id" in query:
      return self._resume(store.find_upload(query["upload_id"]), body)
    described = json.loads(bytes(body) or b"{}")
    name = query.get("name") or described["name"]
    kind = described.get("contentType") or "application/octet-stream"
    key = store.start_upload(Upload(bucket, name, kind, query))
    place = f"{self._place()}{self.path}&upload_id={key}"
    return self._answer(
      200, b"", {"Location": place, "X-GUploader-UploadID": key}
    )

  def _resume(self, upload: Upload, body: Any) -> None:
    """Takes a piece of an upload; one that came before is taken once."""
    asked = self.headers.get("Content-Range", "")
    whole = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(\*|\d+)", asked)
    if whole and whole[1]:
      body = memoryview(body)[max(0, upload.size - int(whole[1])) :]
    if len(body):
      upload.pieces.append(body)
    total = whole[3] if whole else str(upload.size)
    if total != "*" and upload.size >= int(total):
      pieces = upload.pieces
      data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
      return self._json(
        self.store.put(
          upload.bucket, upload.name, data, upload.kind, upload.query
        )
      )
    end = upload.size - 1
    return self._answer(
      308, b"", {"Range": f"bytes=0-{end}"} if end > 0 else {}
    )

  def _body(self) -> bytes | memoryview:
    if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
      pieces = []
      while size := int(self.rfile.readline().split(b";")[0], 16):
        pieces.append(self.rfile.read(size))
        self.rfile.readline()
      self.rfile.readline()
      return b"".join(pieces)
    size = int(self.headers.get("Content-Length") or 0)
    if size < _LARGE:
      return self.rfile.read(size)
    room = memoryview(self.store.room(size))
    if self.rfile.readinto(room) < size:
      raise ConnectionError("The client is gone.")
    return room.toreadonly()

  def _json(self, value: dict[str, Any]) -> None:
    text = json.dumps(value)
    # As the real one, absolute: the library follows it as it is.
    text = text.replace('"mediaLink": "/', f'"mediaLink": "{self._place()}/')
    self._answer(200, text.encode(), {"Content-Type": "application/json"})

  def _place(self) -> str:
    host = self.headers.get("Host", "")
    return f"http{'s' * host.endswith('googleapis.com')}://{host}"

  def _error(self, refused: Refused) -> None:
    error = {"message": refused.reason, "domain": "global"}
    error |= {"reason": refused.word or "invalid"}
    value = {"code": refused.status, "message": refused.reason}
    headers = {"Content-Type": "application/json"}
    if refused.status in (429, 503):
      headers["Retry-After"] = "1"
    answer = json.dumps({"error": value | {"errors": [error]}}).encode()
    self._answer(refused.status, answer, headers)

  def _answer(
    self,
    status: int,
    body: bytes | memoryview,
    headers: dict[str, str] | None = None,
  ) -> None:
    lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    if status not in (204, 304):
      lines.append(f"Content-Length: {len(body)}")
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    if self.command == "HEAD":
      body = b""
    if self._cut:
      self._cut, self.close_connection = False, True
      if (headers or {}).get("X-Goog-Hash"):  # An object, not a word about it.
        self.connection.sendall(head + body[: len(body) // 2])
      return
    if len(body) < _LARGE:
      self.connection.sendall(head + body)
    else:
      self.connection.sendall(head)
      self.connection.sendall(body)

  def log_message(self, format: str, *args: Any) -> None:
    """Logs nothing."""


def _split_multipart(kind: str, body: Any) -> tuple[dict, str, Any]:
  """The description, content type and data of a multipart/related body."""
  found = re.search(r"""boundary=["']?([^"';]+)""", kind)
  assert found
  edge, head = b"--" + found[1].encode(), bytes(body[: 1 << 16])
  # gcloud ends lines with \n, the others with \r\n.
  line = b"\r\n" if edge + b"\r\n" in head else b"\n"
  _, described, rest = head.split(edge, 2)
  meta = json.loads(described.partition(line * 2)[2])
  start = len(head) - len(rest) + rest.index(line * 2) + 2 * len(line)
  tail = bytes(body[-256:])
  end = len(body) - len(tail) + tail.rindex(line + edge + b"--")
  own = re.search(rb"(?i)content-type: *([^\r\n]+)", rest)
  default = meta.get("contentType", "application/octet-stream")
  return meta, own[1].decode() if own else default, body[start:end]


class Server(http.server.ThreadingHTTPServer):
  """The fake on a port of its own choice; use as a context manager."""

  daemon_threads = True
  request_queue_size = 256

  def __init__(
    self,
    certificates: pathlib.Path,
    *,
    port: int = 0,
    folder: pathlib.Path | None = None,
  ):
    """Listens at the port, or at any free one.

    Args:
      certificates: A folder for those that TensorFlow is to trust.
      port: On the loopback interface; 0 for a free one.
      folder: Where large objects are kept; in memory if none.
    """
    self.store = Bucket(folder)
    self.tunnel = proxy.Tunnel(certificates)
    fields = {"store": self.store, "tunnel": self.tunnel}
    super().__init__(("127.0.0.1", port), type("Handler", (Handler,), fields))

  @property
  def port(self) -> int:
    return self.server_address[1]

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.port}"

  def environment(self) -> dict[str, str]:
    """The variables that lead every client of Google Cloud Storage here."""
    return {
      "HTTPS_PROXY": self.url,
      "https_proxy": self.url,
      "CURL_CA_BUNDLE": str(self.tunnel.authority),
      # JAX's processes find each other without a proxy.
      "NO_PROXY": "127.0.0.1,localhost",
      "no_proxy": "127.0.0.1,localhost",
      "NO_GCE_CHECK": "true",
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
      "STORAGE_EMULATOR_HOST": self.url,
    }

  def handle_error(self, request: Any, client_address: Any) -> None:
    """Prints it, unless a client is gone, which is no error of the bucket."""
    if not isinstance(sys.exception(), OSError):
      traceback.print_exc()

  def __enter__(self) -> "Server":
    threading.Thread(
      target=self.serve_forever, args=(0.05,), daemon=True
    ).start()
    return self

  def __exit__(self, *_: object) -> None:
    self.shutdown()
    self.server_close()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--port", type=int, default=0)
  parser.add_argument("--folder", type=pathlib.Path)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as certificates:
    server = Server(
      pathlib.Path(certificates), port=flags.port, folder=flags.folder
    )
    for name, value in server.environment().items():
      print(f"export {name}={shlex.quote(value)}")
    print(end="", flush=True)
    try:
      server.serve_forever()
    except KeyboardInterrupt:
      pass


if __name__ == "__main__":
  main()
