"""The objects of a bucket, as Google Cloud Storage lists them.

Reading and writing many bytes is TensorStore's work; its listings have no
sizes and no checksums.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from data_pipelines.validation import SettingError, printable

PATIENCE_SECONDS = 120  # Of retries, before a bucket does not answer.


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
    RuntimeError: The bucket does not answer.
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
    raise RuntimeError(
      f"{shown}: gs://{bucket} does not answer: {_line(error)}"
    ) from error


def _line(error: BaseException) -> str:
  """An error of a library in one short line."""
  return printable(" ".join(str(error).split()).rstrip("."))[:300]
