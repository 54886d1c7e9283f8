"""A bucket on the loopback interface: the parts of GCS's JSON API that we use.

Speaks what TensorStore, google-cloud-storage and TensorFlow send: media,
multipart and resumable uploads, ranges, listings, preconditions, copies,
rewrites and compositions. Objects are kept in memory, and outlive the programs
that wrote them. Faults are set by `Faults` or by a PUT of its fields to
/faults: a share of answers 503 or 429, of cut connections, a delay, an outage.

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
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import google_crc32c

from tests.gcs import proxy

_API = "/storage/v1/b/([^/]+)"


@dataclasses.dataclass
class Faults:
  """How the bucket fails.

  Attributes:
    busy: Share of requests that are answered 503 or 429, half of each.
    cut: Share of connections that end in the middle of the answer.
    delay: Seconds before each answer.
    outage: True while no request is answered.
    seed: Of the order in which faults fall.
  """

  busy: float = 0.0
  cut: float = 0.0
  delay: float = 0.0
  outage: bool = False
  seed: int = 0


@dataclasses.dataclass(frozen=True)
class Blob:
  """An object: its bytes, generation and content type."""

  data: bytes
  generation: int
  content_type: str
  updated: str

  @functools.cached_property
  def crc32c(self) -> str:
    """The checksum, as the API writes it."""
    crc = google_crc32c.value(self.data).to_bytes(4, "big")
    return base64.b64encode(crc).decode()

  @functools.cached_property
  def md5(self) -> str:
    """The MD5 digest, as the API writes it."""
    digest = hashlib.md5(self.data, usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()

  def describe(self, bucket: str, name: str) -> dict[str, Any]:
    """The resource that the API returns."""
    quoted = urllib.parse.quote(name, safe="")
    return {
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
      "md5Hash": self.md5,
      "etag": f"{self.generation}",
      "storageClass": "STANDARD",
      "mediaLink": f"/download/storage/v1/b/{bucket}/o/{quoted}?alt=media",
    }


class Refused(Exception):
  """An answer that is no success."""

  def __init__(self, status: int, reason: str):
    super().__init__(reason)
    self.status, self.reason = status, reason


class Bucket:
  """All buckets of the fake, and what was asked of it."""

  def __init__(self) -> None:
    self.faults = Faults()
    self.objects: dict[tuple[str, str], Blob] = {}
    self.uploads: dict[str, tuple[str, str, str, Any, bytearray]] = {}
    self.lock = threading.Lock()
    self.requests: list[str] = []
    self._generations = itertools.count(1)
    self._random = random.Random(0)

  def set_faults(self, **fields: Any) -> None:
    self.faults = Faults(**fields)
    self._random = random.Random(self.faults.seed)

  def draw(self) -> tuple[float, float]:
    """Two numbers in [0, 1), which decide whether a request fails."""
    with self.lock:
      return self._random.random(), self._random.random()

  def put(
    self, bucket: str, name: str, data: bytes, kind: str, if_match: str | None
  ) -> dict[str, Any]:
    """Stores an object whole, if the precondition on its generation holds."""
    with self.lock:
      self._check(bucket, name, if_match)
      now = datetime.datetime.now(datetime.UTC).isoformat()
      blob = Blob(bytes(data), next(self._generations), kind, now)
      self.objects[bucket, name] = blob
    return blob.describe(bucket, name)

  def get(self, bucket: str, name: str, generation: str | None = None) -> Blob:
    """The object; Refused(404) if there is none of this generation."""
    blob = self.objects.get((bucket, name))
    if blob is None or generation not in (None, str(blob.generation)):
      raise Refused(404, f"No such object: {bucket}/{name}")
    return blob

  def delete(self, bucket: str, name: str, if_match: str | None) -> None:
    with self.lock:
      self.get(bucket, name)
      self._check(bucket, name, if_match)
      del self.objects[bucket, name]

  def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
    """A page of a listing, with `prefix`, `delimiter` and page tokens."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    start, end = query.get("startOffset", ""), query.get("endOffset", "")
    limit = int(query.get("maxResults", "1000"))
    token = query.get("pageToken", "")
    with self.lock:
      found = {n: b for (own, n), b in self.objects.items() if own == bucket}
    items: list[dict[str, Any]] = []
    prefixes: set[str] = set()
    last = ""
    for name in sorted(found):
      if not name.startswith(prefix) or name < start or (end and name >= end):
        continue
      if token and name <= token:
        continue
      if len(items) + len(prefixes) >= limit:
        return self._page(items, prefixes) | {"nextPageToken": last}
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        folder = prefix + rest.split(delimiter)[0] + delimiter
        prefixes.add(folder)
        last = folder + "\U0010ffff"
        continue
      items.append(found[name].describe(bucket, name))
      last = name
    return self._page(items, prefixes)

  @staticmethod
  def _page(items: list, prefixes: set[str]) -> dict[str, Any]:
    page: dict[str, Any] = {"kind": "storage#objects"}
    if items:
      page["items"] = items
    if prefixes:
      page["prefixes"] = sorted(prefixes)
    return page

  def _check(self, bucket: str, name: str, if_match: str | None) -> None:
    if if_match is None:
      return
    blob = self.objects.get((bucket, name))
    if int(if_match) != (blob.generation if blob else 0):
      raise Refused(412, "At least one of the pre-conditions did not hold.")


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers one connection."""

  protocol_version = "HTTP/1.1"
  store: Bucket

  def _serve(self) -> None:
    parts = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    body = self._body()
    faults, store = self.store.faults, self.store
    if parts.path == "/faults":
      store.set_faults(**json.loads(body or b"{}"))
      return self._answer(200, b"{}")
    with store.lock:
      store.requests.append(f"{self.command} {self.path}")
    if faults.outage:
      self.close_connection = True
      return None
    if faults.delay:
      time.sleep(faults.delay)
    busy, cut = store.draw()
    if busy < faults.busy:
      status = 503 if busy < faults.busy / 2 else 429
      return self._error(status, "Try again later.")
    self._cut = cut < faults.cut
    try:
      return self._route(parts.path, query, body)
    except Refused as error:
      return self._error(error.status, error.reason)

  do_GET = do_PUT = do_POST = do_DELETE = do_PATCH = do_HEAD = _serve

  def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
    if match := re.fullmatch(
      r"/(resumable/)?upload/storage/v1/b/([^/]+)/o", path
    ):
      return self._upload(match[2], query, body)
    if match := re.fullmatch(
      r"(?:/download)?/storage/v1/b/([^/]+)/o/(.+)", path
    ):
      return self._object(match[1], match[2], query, body)
    if match := re.fullmatch(rf"{_API}/o/?", path):
      return self._json(self.store.list(match[1], query))
    if match := re.fullmatch(rf"{_API}/storageLayout", path):
      layout = {"kind": "storage#storageLayout", "bucket": match[1]}
      return self._json(
        layout | {"hierarchicalNamespace": {"enabled": False}, "location": "US"}
      )
    if match := re.fullmatch(_API, path):
      return self._json(
        {
          "kind": "storage#bucket",
          "id": match[1],
          "name": match[1],
          "location": "US",
          "timeCreated": "2026-01-01T00:00:00Z",
        }
      )
    # The XML API's reads, which TensorFlow uses: /BUCKET/OBJECT.
    if match := re.fullmatch(r"/([^/]+)/(.+)", path):
      blob = self.store.get(match[1], urllib.parse.unquote(match[2]))
      return self._media(blob)
    raise Refused(404, f"The fake has no {self.command} {path}")

  def _object(
    self, bucket: str, rest: str, query: dict[str, str], body: bytes
  ) -> None:
    store = self.store
    unquote = urllib.parse.unquote
    if match := re.fullmatch(r"(.+)/(rewriteTo|copyTo)/b/([^/]+)/o/(.+)", rest):
      blob = store.get(bucket, unquote(match[1]))
      there = unquote(match[4])
      if_match = query.get("ifGenerationMatch")
      made = store.put(match[3], there, blob.data, blob.content_type, if_match)
      if match[2] == "copyTo":
        return self._json(made)
      size = str(len(blob.data))
      return self._json(
        {
          "kind": "storage#rewriteResponse",
          "done": True,
          "objectSize": size,
          "totalBytesRewritten": size,
          "resource": made,
        }
      )
    if match := re.fullmatch(r"(.+)/compose", rest):
      asked = json.loads(body)
      names = [x["name"] for x in asked["sourceObjects"]]
      data = b"".join(store.get(bucket, name).data for name in names)
      kind = asked.get("destination", {}).get("contentType", "text/plain")
      if_match = query.get("ifGenerationMatch")
      name = unquote(match[1])
      return self._json(store.put(bucket, name, data, kind, if_match))
    name = unquote(rest)
    if self.command == "DELETE":
      store.delete(bucket, name, query.get("ifGenerationMatch"))
      return self._answer(204, b"")
    blob = store.get(bucket, name, query.get("generation"))
    if query.get("ifGenerationNotMatch") == str(blob.generation):
      return self._answer(304, b"")
    wanted = query.get("ifGenerationMatch")
    if wanted is not None and wanted != str(blob.generation):
      raise Refused(412, "The generation differs.")
    if query.get("alt") == "media":
      return self._media(blob)
    return self._json(blob.describe(bucket, name))

  def _media(self, blob: Blob) -> None:
    data, status, headers = blob.data, 200, {}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
    if asked:
      size = len(data)
      if asked[1]:
        start, end = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
      else:
        start, end = max(0, size - int(asked[2])), size - 1
      if start >= size or start > end:
        raise Refused(416, "The range holds no byte.")
      data, status = memoryview(data)[start : end + 1], 206
      headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    headers["X-Goog-Generation"] = str(blob.generation)
    headers["X-Goog-Hash"] = f"crc32c={blob.crc32c}"
    headers["Content-Type"] = blob.content_type
    self._answer(status, data, headers)

  def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
    store, if_match = self.store, query.get("ifGenerationMatch")
    kind = self.headers.get("Content-Type", "application/octet-stream")
    if query.get("uploadType") == "multipart":
      described, kind, data = _split_multipart(kind, body)
      name = query.get("name") or described["name"]
      return self._json(store.put(bucket, name, data, kind, if_match))
    if query.get("uploadType") != "resumable":
      return self._json(store.put(bucket, query["name"], body, kind, if_match))
    if "upload_id" not in query:
      described = json.loads(body or b"{}")
      name = query.get("name") or described["name"]
      kind = described.get("contentType") or "application/octet-stream"
      with store.lock:
        key = f"u{len(store.uploads)}"
        store.uploads[key] = bucket, name, kind, if_match, bytearray()
      host = self.headers.get("Host", "")
      scheme = "https" if host.endswith("googleapis.com") else "http"
      place = f"{scheme}://{host}{self.path}&upload_id={key}"
      return self._answer(
        200, b"", {"Location": place, "X-GUploader-UploadID": key}
      )
    return self._resume(query["upload_id"], body)

  def _resume(self, key: str, body: bytes) -> None:
    if key not in self.store.uploads:
      raise Refused(404, "No such upload.")
    bucket, name, kind, if_match, data = self.store.uploads[key]
    asked = self.headers.get("Content-Range", "")
    whole = re.fullmatch(r"bytes (?:\*|(\d+)-(\d+))/(\*|\d+)", asked)
    if whole and whole[1]:
      del data[int(whole[1]) :]
    data += body
    total = whole[3] if whole else str(len(data))
    if total != "*" and len(data) >= int(total):
      return self._json(
        self.store.put(bucket, name, bytes(data), kind, if_match)
      )
    headers = {"Range": f"bytes=0-{len(data) - 1}"} if data else {}
    return self._answer(308, b"", headers)

  def _body(self) -> bytes:
    if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
      return b"".join(self._chunks())
    return self.rfile.read(int(self.headers.get("Content-Length") or 0))

  def _chunks(self) -> Iterator[bytes]:
    while size := int(self.rfile.readline().split(b";")[0], 16):
      yield self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()

  def _json(self, value: dict[str, Any]) -> None:
    self._answer(
      200, json.dumps(value).encode(), {"Content-Type": "application/json"}
    )

  def _error(self, status: int, reason: str) -> None:
    error = {"code": status, "message": reason, "errors": [{"message": reason}]}
    self._answer(
      status,
      json.dumps({"error": error}).encode(),
      {"Content-Type": "application/json"},
    )

  def _answer(
    self,
    status: int,
    body: bytes | memoryview,
    headers: dict[str, str] | None = None,
  ) -> None:
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    if status != 304:
      self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    if self.command == "HEAD":
      return
    if getattr(self, "_cut", False):
      self._cut = False
      self.wfile.write(body[: len(body) // 2])
      self.close_connection = True
      return
    self.wfile.write(body)

  def log_message(self, *_: Any) -> None:
    """Logs nothing."""


def _split_multipart(kind: str, body: bytes) -> tuple[dict, str, bytes]:
  """The description, content type and data of a multipart/related body."""
  found = re.search(r"""boundary=["']?([^"';]+)""", kind)
  assert found
  edge = b"--" + found[1].encode()
  # gcloud ends lines with \n, the others with \r\n.
  line = b"\r\n" if edge + b"\r\n" in body else b"\n"
  described, data = (x.removeprefix(line) for x in body.split(edge)[1:-1])
  meta = json.loads(described.partition(line * 2)[2])
  head, _, data = data.partition(line * 2)
  own = re.search(rb"(?i)content-type: *([^\r\n]+)", head)
  default = meta.get("contentType", "application/octet-stream")
  return meta, own[1].decode() if own else default, data.removesuffix(line)


class Server(http.server.ThreadingHTTPServer):
  """The fake on a port of its own choice; use as a context manager."""

  daemon_threads = True
  request_queue_size = 256

  def __init__(self, port: int = 0):
    self.store = Bucket()
    self.tunnel: proxy.Proxy | None = None
    handler = type("Handler", (Handler,), {"store": self.store})
    super().__init__(("127.0.0.1", port), handler)

  @property
  def port(self) -> int:
    return self.server_address[1]

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.port}"

  def environment(self) -> dict[str, str]:
    """The variables that lead every client of Google Cloud Storage here."""
    tunnel = self.tunnel.environment() if self.tunnel else {}
    return tunnel | {
      "TENSORSTORE_GCS_HTTP_URL": self.url,
      "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
      "STORAGE_EMULATOR_HOST": self.url,
    }

  def __enter__(self) -> "Server":
    threading.Thread(target=self.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self.shutdown()
    self.server_close()


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--port", type=int, default=0)
  server = Server(parser.parse_args().port)
  print(server.url, flush=True)
  server.serve_forever()


if __name__ == "__main__":
  main()
