"""The objects of a bucket: lists, reads and writes them without TensorFlow."""

import concurrent.futures
import contextlib
import errno
import functools
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

  `what` is the setting or flag that names the path.

  Raises:
    SettingError: The bucket does not exist, or may not be read.
    OSError: The bucket does not answer.
  """
  bucket, name = split(path)
  with refusals(path, what=what):
    if name and (one := _blob(path).bucket.get_blob(name, **_patience())):
      return {"": Object(one.size, one.crc32c, one.generation)}
    prefix = f"{name}/" if name else ""
    found = client().list_blobs(bucket, prefix=prefix, **_patience())
    return {
      each.name[len(prefix) :]: Object(each.size, each.crc32c, each.generation)
      for each in found
      if not each.name.endswith("/")  # A console's mark of a folder.
    }


def size_of(path: str | os.PathLike[str]) -> int:
  """Bytes of an object; raises a FileNotFoundError if there is none."""
  found = list_objects(path, what="file").get("")
  if found is None:
    raise FileNotFoundError(f"there is no {printable(os.fspath(path))}")
  return found.size


def exists(path: str | os.PathLike[str], *, what: str) -> bool:
  """True if there is such a file or folder, here or in a bucket."""
  if "://" not in os.fspath(path):
    return os.path.exists(path)
  return bool(list_objects(path, what=what))


@contextlib.contextmanager
def open_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
  """A file to read, or an object as one that is read in parts."""
  if "://" not in os.fspath(path):
    with open(path, "rb") as file:
      yield file
  else:
    with refusals(path, what="file"):
      blob = _blob(path)
      # With its generation, so that no parts of two versions are read.
      blob = blob.bucket.get_blob(blob.name, **_patience())
      if blob is None:
        raise FileNotFoundError(f"there is no {printable(os.fspath(path))}")
      yield blob.open("rb", chunk_size=_BUFFER, **_patience())


def put(path: str | os.PathLike[str], data: bytes, *, what: str) -> None:
  """Writes an object whole."""
  with refusals(path, what=what):
    _blob(path).upload_from_string(data, **_patience())


def replace_folder(
  folder: pathlib.Path, path: str | os.PathLike[str], *, last: str, what: str
) -> None:
  """Makes a folder of a bucket equal to one on this disk, in parallel.

  The file `last` is removed first and put last: with it the folder is whole.

  Raises:
    OSError: The bucket does not answer, or another process writes there.
  """
  place, found = os.fspath(path), [x for x in folder.rglob("*") if x.is_file()]
  files = {x.relative_to(folder).as_posix(): x for x in found}
  checksums: dict[str, str] = {}

  def put_file(name: str) -> None:
    blob = _blob(f"{place}/{name}")
    blob.upload_from_filename(files[name], **_patience())
    checksums[name] = blob.crc32c

  def remove(names: set[str]) -> None:
    blobs = [_blob(f"{place}/{name}") for name in names]
    if blobs:
      skip = {"on_error": lambda _: None}
      blobs[0].bucket.delete_blobs(blobs, **skip, **_patience())

  size = sum(file.stat().st_size for file in found) / 1e9
  logging.info("%s: puts %.2f GB into %s.", what, size, place)
  with refusals(path, what=what):
    old = list_objects(path, what=what).keys()
    remove(old & {last})
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      list(pool.map(put_file, files.keys() - {last}))
    remove(old - files.keys())
    listed = list_objects(path, what=what)
    if {name: each.crc32c for name, each in listed.items()} != checksums:
      raise OSError(errno.EBUSY, f"another process writes to {place}")
    put_file(last)


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


def _blob(path: str | os.PathLike[str]) -> Any:
  bucket, name = split(path)
  return client().bucket(bucket).blob(name)


def _patience() -> dict[str, Any]:
  from google.cloud.storage.retry import DEFAULT_RETRY

  return {"retry": DEFAULT_RETRY.with_timeout(PATIENCE_SECONDS), "timeout": 60}


@contextlib.contextmanager
def refusals(path: str | os.PathLike[str], *, what: str) -> Iterator[None]:
  """Turns a bucket's errors into words: what to change, or that it is away."""
  import google.auth.exceptions as auth
  import requests
  from google.api_core import exceptions as api

  missing = api.NotFound, api.BadRequest
  refused = api.Forbidden, api.Unauthorized, auth.RefreshError
  errors = api.GoogleAPIError, auth.GoogleAuthError, requests.RequestException
  try:
    yield
  except errors as error:
    bucket, shown = split(path)[0], f"{what} ({os.fspath(path)!r})"
    reason = re.sub(r"(GET|POST|PUT|DELETE) \S+: ", "", str(error))  # The URL.
    reason = printable(" ".join(reason.split()).rstrip("."))[:300]
    if isinstance(error, (*missing, *refused, auth.DefaultCredentialsError)):
      remedy = (
        "correct the name, or create what is missing"
        if isinstance(error, missing)
        else "grant this machine's account roles/storage.objectUser on "
        f"gs://{bucket}, or run 'gcloud auth application-default login'"
      )
      text = f"{shown} must be open to this program: {reason}; {remedy}."
      raise SettingError(text) from error
    text = f"{shown}: gs://{bucket} does not answer: {reason}"
    raise OSError(errno.ETIMEDOUT, text) from error
