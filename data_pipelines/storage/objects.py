"""The objects of a bucket: lists, reads and replaces them, without TensorFlow.

Listings are those of Google Cloud Storage, for TensorStore's have no sizes and
no checksums; TensorStore reads.
"""

import concurrent.futures
import contextlib
import errno
import functools
import io
import os
import pathlib
import re
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from absl import logging

from data_pipelines.validation import SettingError, printable

PATIENCE_SECONDS = 120  # Of retries, before a bucket does not answer.
_BUFFER = 8 * 2**20


class Object(NamedTuple):
  """A version of an object."""

  size: int  # Bytes.
  crc32c: str  # Big-endian, in base64.
  generation: int  # Another one for each write.


def split(path: str | os.PathLike[str]) -> tuple[str, str]:
  """The bucket and the name of an object."""
  bucket, _, name = os.fspath(path).removeprefix("gs://").partition("/")
  return bucket, name


def list_objects(
  path: str | os.PathLike[str], *, what: str
) -> dict[str, Object]:
  """The objects of a folder by relative name, in order; that of a file by "".

  `what` is the setting or flag that names the path. Empty if there are none.

  Raises:
    SettingError: The bucket does not exist, or may not be read.
    OSError: The bucket does not answer.
  """
  bucket, name = split(path)
  with refusals(path, what=what):
    if name and (one := client().bucket(bucket).get_blob(name, **_patience())):
      return {"": Object(one.size, one.crc32c, one.generation)}
    prefix = f"{name}/" if name else ""
    fields = "items(name,size,generation,crc32c),nextPageToken"
    found = client().list_blobs(
      bucket, prefix=prefix, fields=fields, **_patience()
    )
    return {
      each.name[len(prefix) :]: Object(each.size, each.crc32c, each.generation)
      for each in found
      if not each.name.endswith("/")  # A console's mark of a folder.
    }


def read(path: str | os.PathLike[str]) -> bytes:
  """The content of an object; raises a FileNotFoundError if there is none."""
  bucket, name = split(path)
  try:
    with refusals(path, what="file"):
      return value(store(bucket).read(name), name)
  except Changed:
    shown = printable(os.fspath(path))
    raise FileNotFoundError(f"There is no {shown}.") from None


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
  """A file to read, or an object as one that is read in parts; see `read`."""
  if "://" not in os.fspath(path):
    return open(path, "rb")
  return io.BufferedReader(_Reader(path), _BUFFER)


class _Reader(io.RawIOBase):
  """An object of which each read is a request."""

  def __init__(self, path: str | os.PathLike[str]):
    self._path, self._at = path, 0
    found = list_objects(path, what="file").get("")
    if found is None:
      raise FileNotFoundError(f"There is no {printable(os.fspath(path))}.")
    self._object = found
    self._bucket, self._name = split(path)

  def readable(self) -> bool:
    return True

  seekable = readable

  def readinto(self, buffer: Any, /) -> int:
    end = min(self._at + len(buffer), self._object.size)
    if end <= self._at:
      return 0
    with refusals(self._path, what="file"):
      part = slice(self._at, end)
      future = store(self._bucket).read(self._name, byte_range=part)
      data = value(future, self._name)
    buffer[: len(data)] = data
    self._at += len(data)
    return len(data)

  def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
    start = (0, self._at, self._object.size)[whence]
    self._at = max(0, start + offset)
    return self._at


def put(path: str | os.PathLike[str], data: bytes, *, what: str) -> None:
  """Writes an object whole."""
  bucket, name = split(path)
  with refusals(path, what=what):
    client().bucket(bucket).blob(name).upload_from_string(data, **_patience())


class Changed(Exception):
  """An object is gone, or is not the one that was listed."""

  def __init__(self, name: str):
    super().__init__(f"{printable(name)} has changed")


@functools.cache
def store(bucket: str) -> Any:
  """TensorStore's view of a bucket."""
  import tensorstore as ts

  context = ts.Context({"gcs_request_retries": {"max_retries": 8}})
  spec = {"driver": "gcs", "bucket": bucket}
  return ts.KvStore.open(spec, context=context).result()


def value(future: Any, name: str) -> bytes:
  """The bytes that TensorStore has read, within `refusals`."""
  from google.api_core import exceptions as api

  try:
    read = future.result()
  except Exception as error:  # TensorStore's errors have no classes.
    if "OUT_OF_RANGE" in str(error):
      raise Changed(name) from error
    refused = re.search("PERMISSION_DENIED|UNAUTHENTICATED", str(error))
    kind = api.Forbidden if refused else api.ServiceUnavailable
    raise kind(str(error)) from error
  if read.state != "value":
    raise Changed(name)
  return read.value


def replace_folder(
  folder: pathlib.Path, path: str | os.PathLike[str], *, last: str, what: str
) -> None:
  """Makes a folder of a bucket equal to one on this disk, in parallel.

  The file `last` is removed first and put last: with it the folder is whole.

  Raises:
    OSError: The bucket does not answer, or another process writes there.
  """
  bucket, prefix = split(path)
  files = {
    file.relative_to(folder).as_posix(): file
    for file in sorted(folder.rglob("*"))
    if file.is_file()
  }

  def put(name: str) -> None:
    blob = client().bucket(bucket).blob("/".join(filter(None, (prefix, name))))
    blob.upload_from_filename(files[name], **_patience())
    put_crcs[name] = blob.crc32c

  def remove(names: set[str]) -> None:
    blobs = ["/".join(filter(None, (prefix, name))) for name in names]
    client().bucket(bucket).delete_blobs(
      blobs, on_error=lambda _: None, **_patience()
    )

  put_crcs: dict[str, str] = {}
  size = sum(file.stat().st_size for file in files.values())
  logging.info("%s: puts %.2f GB into %s.", what, size / 1e9, os.fspath(path))
  with refusals(path, what=what):
    old = list_objects(path, what=what).keys()
    remove(old & {last})
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      list(pool.map(put, sorted(files.keys() - {last})))
    remove(old - files.keys())
    found = list_objects(path, what=what)
    if {name: each.crc32c for name, each in found.items()} != put_crcs:
      text = f"{what} ({os.fspath(path)!r}): another process writes there"
      raise OSError(errno.EBUSY, text)
    put(last)


@functools.cache
def client() -> Any:
  """The client of Google Cloud Storage, with the credentials found here."""
  import google.auth.exceptions
  from google.cloud import storage

  try:
    return storage.Client(project=None)
  except google.auth.exceptions.DefaultCredentialsError:
    if "GOOGLE_APPLICATION_CREDENTIALS" in os.environ:
      raise
    return storage.Client.create_anonymous_client()  # Reads public buckets.


def _patience() -> dict[str, Any]:
  from google.cloud.storage.retry import DEFAULT_RETRY

  return {"retry": DEFAULT_RETRY.with_timeout(PATIENCE_SECONDS), "timeout": 60}


@contextlib.contextmanager
def refusals(path: str | os.PathLike[str], *, what: str) -> Iterator[None]:
  """Puts a bucket's errors into words: what to change, or that it is away."""
  import google.auth.exceptions as auth
  import requests
  from google.api_core import exceptions as api

  bucket, shown = split(path)[0], f"{what} ({os.fspath(path)!r})"
  try:
    yield
  except api.NotFound as error:
    raise SettingError(
      f"{shown} must be in a bucket that exists, and there is no gs://{bucket};"
      " correct its name, or create it by 'gcloud storage buckets create'."
    ) from error
  except (api.Forbidden, api.Unauthorized) as error:
    raise SettingError(
      f"{shown} must be open to this machine's account: {_line(error)}; grant "
      f"it roles/storage.objectUser on gs://{bucket}, or log in by 'gcloud "
      "auth application-default login'."
    ) from error
  except (auth.DefaultCredentialsError, auth.RefreshError) as error:
    raise SettingError(
      f"{shown} needs credentials: {_line(error)}; log in by 'gcloud auth "
      "application-default login'."
    ) from error
  except api.BadRequest as error:
    raise SettingError(f"{shown} must be readable: {_line(error)}.") from error
  except (
    *(api.GoogleAPIError, auth.GoogleAuthError, requests.RequestException),
  ) as error:
    text = f"{shown}: gs://{bucket} does not answer: {_line(error)}"
    raise OSError(errno.ETIMEDOUT, text) from error


def _line(error: BaseException) -> str:
  """An error of a library in one short line."""
  return printable(" ".join(str(error).split()).rstrip("."))[:300]
