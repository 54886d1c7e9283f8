"""The fake bucket, asked by the clients of Google Cloud Storage."""

import json
import pathlib
import signal
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
import tensorstore as ts
from etils import epath
from google.api_core import exceptions
from google.cloud import storage

ANY = b"some bytes\r\n\x00" * 1000


def opened(name: str = "bucket") -> ts.KvStore:
  return ts.KvStore.open(f"gs://{name}/runs/").result()


def ask(bucket, path: str, *, method="GET", body=None) -> bytes:
  request = urllib.request.Request(bucket.url + path, body, method=method)
  with urllib.request.urlopen(request) as answer:
    return answer.read()


def test_what_one_client_writes_the_others_read(bucket_here):
  """TensorFlow's through the proxy; a large object in a resumable upload."""
  large = np.random.default_rng(0).bytes(9 << 20)
  blobs = storage.Client(project="any").bucket("bucket")
  opened().write("tensorstore", ANY).result()
  epath.Path("gs://bucket/runs/tensor flow").write_bytes(ANY)
  blobs.blob("runs/google").upload_from_string(ANY, "text/plain")
  blobs.blob("runs/large").upload_from_string(large)
  names = ["google", "large", "tensor flow", "tensorstore"]
  for name in names:
    data = large if name == "large" else ANY
    assert opened().read(name).result().value == data
    assert epath.Path(f"gs://bucket/runs/{name}").read_bytes() == data
    assert blobs.blob(f"runs/{name}").download_as_bytes() == data
  assert opened().list().result() == [name.encode() for name in names]
  folder = epath.Path("gs://bucket/runs")
  assert sorted(path.name for path in folder.iterdir()) == names
  assert [b.name for b in blobs.list_blobs(prefix="runs/t")] == [
    "runs/tensor flow",
    "runs/tensorstore",
  ]
  # TensorFlow's own: a copy, then a deletion.
  (folder / "google").rename(folder / "renamed")
  assert blobs.get_blob("runs/google") is None
  assert bucket_here.store.objects["bucket", "runs/renamed"].data == ANY
  folder.rmtree()
  assert bucket_here.store.names("bucket") == []


def test_a_page_of_a_listing_holds_what_the_next_does_not(bucket):
  names = [f"{a}/{b}" for a in ("a", "b", "c") for b in range(3)] + ["d", "é"]
  for name in names:
    bucket.store.put("bucket", name, b"", "text/plain", {})

  def listed(**query) -> list[str]:
    return [*pages(query)]

  def pages(query):
    while True:
      text = "&".join(f"{k}={v}" for k, v in query.items())
      page = json.loads(ask(bucket, f"/storage/v1/b/bucket/o?{text}"))
      yield from page.get("prefixes", [])
      yield from (x["name"] for x in page.get("items", []))
      if "nextPageToken" not in page:
        return
      query["pageToken"] = urllib.parse.quote(page["nextPageToken"])

  for limit in (1, 2, 3, 100):
    assert listed(maxResults=limit) == sorted(names)
    folders = ["a/", "b/", "c/", "d", "é"]
    assert listed(maxResults=limit, delimiter="/") == folders
    some = listed(maxResults=limit, startOffset="a/2", endOffset="c/0")
    assert some == ["a/2", "b/0", "b/1", "b/2"]


def test_an_object_changes_only_from_the_wanted_generation(bucket_here):
  """For two clients, of which the slower one changes nothing."""
  store = opened()
  blob = storage.Client(project="any").bucket("bucket").blob("runs/lease")
  none = store.read("lease").result().stamp.generation
  store.write("lease", b"1", if_equal=none).result()
  store.write("lease", b"2", if_equal=none).result()
  with pytest.raises(exceptions.PreconditionFailed):
    blob.upload_from_string("2", if_generation_match=0)
  first = store.read("lease").result()
  assert first.value == b"1"
  store.write("lease", b"3", if_equal=first.stamp.generation).result()
  store.write("lease", b"4", if_equal=first.stamp.generation).result()
  store.write("lease", None, if_equal=first.stamp.generation).result()
  assert store.read("lease").result().value == b"3"
  blob.reload()
  with pytest.raises(exceptions.PreconditionFailed):
    blob.upload_from_string("5", if_generation_not_match=blob.generation)
  with pytest.raises(exceptions.PreconditionFailed):
    blob.delete(if_generation_match=1)
  blob.delete(if_generation_match=blob.generation)
  with pytest.raises(exceptions.NotFound):
    blob.delete()
  assert store.read("lease").result().state == "missing"


def test_clients_try_again_until_a_faulty_bucket_answers(bucket_here):
  store, put = opened(), {}
  bucket_here.store.set_faults(busy=0.2, cut=0.2, seed=1)
  for number in range(6):
    name = f"{number}"
    put[name] = ANY[number:]
    store.write(name, put[name]).result()
  found = {name: store.read(name).result().value for name in put}
  folder = epath.Path("gs://bucket/runs")
  again = {name: (folder / name).read_bytes() for name in put}
  bucket_here.store.set_faults()
  assert found == again == put
  # More than once for each object that was written, and read twice.
  assert len(bucket_here.store.requests) > 4 * len(put)


def test_a_bucket_refuses(bucket_here):
  blobs = storage.Client(project="any")
  with pytest.raises(exceptions.NotFound):
    blobs.get_bucket("no-such-bucket")
  with pytest.raises(exceptions.Forbidden, match="storage.objects"):
    blobs.bucket("forbidden-bucket").blob("a").download_as_bytes()
  with pytest.raises(Exception, match="NOT_FOUND"):
    opened("no-such-bucket").write("a", b"").result()
  with pytest.raises(Exception, match="PERMISSION_DENIED"):
    opened("forbidden-bucket").read("a").result()
  bucket_here.store.set_faults(quota=len(ANY))
  opened().write("a", ANY).result()
  with pytest.raises(Exception, match="PERMISSION_DENIED.*quota"):
    opened().write("b", ANY).result()
  assert bucket_here.store.names("bucket") == ["runs/a"]


def test_a_callback_strikes_between_two_puts(bucket_here):
  seen = []
  store = bucket_here.store
  store.at_put(2, lambda: seen.append(store.names("bucket")))
  for name in ("a", "b", "c"):
    opened().write(name, b"").result()
  assert seen == [["runs/a", "runs/b"]]


def test_the_program_prints_what_leads_a_shell_to_it(tmp_path):
  """Large objects are in its folder; faults come by a PUT."""
  process = subprocess.Popen(
    [sys.executable, "-m", "tests.gcs.fake", f"--folder={tmp_path}"],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout
  try:
    lines = [process.stdout.readline() for _ in range(9)]
    said = dict(x.removeprefix("export ").strip().split("=", 1) for x in lines)
    url = said["STORAGE_EMULATOR_HOST"]
    data = bytes(range(256)) * (8 << 10)
    made = f"{url}/upload/storage/v1/b/bucket/o?uploadType=media&name=a"
    urllib.request.urlopen(made, data).read()
    held = pathlib.Path(f"/proc/{process.pid}/maps").read_text()
    assert str(tmp_path) in held
    wanted = {"Range": "bytes=5-600000"}
    place = f"{url}/storage/v1/b/bucket/o/a?alt=media"
    with urllib.request.urlopen(
      urllib.request.Request(place, headers=wanted)
    ) as answer:
      assert answer.read() == data[5:600001]
    faults = urllib.request.Request(
      f"{url}/faults", json.dumps({"busy": 1.0}).encode(), method="PUT"
    )
    urllib.request.urlopen(faults).read()
    with pytest.raises(urllib.error.HTTPError) as refused:
      urllib.request.urlopen(place)
    assert refused.value.code in (429, 503)
    assert refused.value.headers["Retry-After"] == "1"
    refused.value.close()
  finally:
    process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    process.stdout.close()


@pytest.mark.parametrize("line", ["\n", "\r\n"])
@pytest.mark.parametrize("data", [b"", b"\r\n--edg", b"x\n" * 200_000])
def test_an_upload_of_two_parts_is_read_as_it_was_sent(bucket, line, data):
  head = ["--edge", "content-type: application/json", "", '{"name": "a"}']
  head += ["--edge", "Content-Type: text/x-any", "", ""]
  body = line.join(head).encode() + data + f"{line}--edge--{line}".encode()
  made = urllib.request.Request(
    f"{bucket.url}/upload/storage/v1/b/bucket/o?uploadType=multipart",
    body,
    {"Content-Type": "multipart/related; boundary='edge'"},
  )
  with urllib.request.urlopen(made) as answer:
    assert json.load(answer)["contentType"] == "text/x-any"
  assert bucket.store.objects["bucket", "a"].data == data
