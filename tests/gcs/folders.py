"""Folders of a test's disk as objects of the fake bucket, and back."""

import pathlib

NAME = "bucket"


def upload(bucket, folder: pathlib.Path, prefix: str) -> None:
  """Puts every file below a folder into gs://bucket/PREFIX."""
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      name = f"{prefix}/{path.relative_to(folder).as_posix()}"
      bucket.store.put(NAME, name, path.read_bytes(), "", {})


def contents(bucket, prefix: str) -> dict[str, bytes]:
  """The bytes of every object below gs://bucket/PREFIX, by relative name."""
  return {
    name.removeprefix(f"{prefix}/"): blob.data
    for (_, name), blob in sorted(bucket.store.objects.items())
    if name.startswith(f"{prefix}/")
  }
