"""One of TensorBoard's event files.

The messages are TensorBoard's own. TensorFlow would write the same records, but
importing it takes longer than the rest of a start.

References:
  The records: https://www.tensorflow.org/tutorials/load_data/tfrecord
"""

import contextlib
import io
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import google_crc32c
import numpy as np
from absl import logging
from google.protobuf import message
from PIL import Image
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import summary_v2 as hparams_plugin
from tensorboard.plugins.image import metadata as image_plugin
from tensorboard.plugins.scalar import metadata as scalar_plugin
from tensorboard.plugins.text import metadata as text_plugin
from tensorboard.util import tensor_util

PATTERN = "events.out.tfevents.*"
_HEAD = 12  # Bytes of a record's length and its checksum.

# Generated on import, unknown to type checkers.
_events: Any = event_pb2
_summaries: Any = summary_pb2


class EventWriter:
  """Writes a new file, which TensorBoard reads after older ones."""

  def __init__(self, folder: pathlib.Path):
    """Opens the file in an existing folder."""
    self._file = (folder / PATTERN.replace("*", f"{time.time():.6f}")).open(
      "xb"
    )
    self._append(file_version="brain.Event:2")

  @property
  def num_bytes(self) -> int:
    """The size of the file."""
    return self._file.tell()

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes points of curves."""
    values = {tag: np.float32(x) for tag, x in scalars.items()}
    self._write(step, values, scalar_plugin)

  def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes texts in Markdown."""
    self._write(step, texts, text_plugin)

  def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
    """Writes images, each uint8 [height, width, 3]."""
    values = {tag: _to_png(image) for tag, image in images.items()}
    self._write(step, values, image_plugin)

  def write_hparams(self, hparams: dict[str, Any]) -> None:
    """Writes the settings for the tab HParams."""
    self._append(summary=hparams_plugin.hparams_pb(hparams))

  def write_summaries(
    self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any]
  ) -> None:
    """Writes values of a step; the metadata of each name its plugin."""
    summary = _summaries.Summary()
    for tag, value in values.items():
      tensor = tensor_util.make_tensor_proto(value)
      summary.value.add(tag=tag, tensor=tensor, metadata=metadata[tag])
    self._append(step=step, summary=summary)

  def close(self) -> None:
    """Closes the file."""
    self._file.close()

  def _write(self, step: int, values: Mapping[str, Any], plugin: Any) -> None:
    metadata = plugin.create_summary_metadata("", "")
    self.write_summaries(step, values, dict.fromkeys(values, metadata))

  def _append(self, **fields: Any) -> None:
    event = _events.Event(wall_time=time.time(), **fields)
    content = event.SerializeToString()
    length = len(content).to_bytes(8, "little")
    parts = length, _checksum(length), content, _checksum(content)
    self._file.write(b"".join(parts))
    self._file.flush()  # A kill loses little.


def rewind(path: pathlib.Path, resume_step: int) -> None:
  """Keeps the events up to `resume_step` that lie before the first bad record.

  A session's START event would hide the others from TensorBoard's own server,
  but not from other readers.
  """
  if not path.is_file():
    raise OSError("it is no regular file")
  # TensorBoard must not take the unfinished copy for an event file.
  temporary = path.with_name("rewound.tmp")
  end, num_bytes = 0, path.stat().st_size
  with temporary.open("wb") as kept, contextlib.suppress(message.DecodeError):
    for record in _records(path, num_bytes):
      if _events.Event.FromString(record[_HEAD:-4]).step <= resume_step:
        kept.write(record)
      end += len(record)
  if end < num_bytes:
    logging.warning(
      "%s: removed the last %d bytes, which a kill or a crash has damaged.",
      *(path, num_bytes - end),
    )
  temporary.replace(path)


def _records(path: pathlib.Path, num_bytes: int) -> Iterator[bytes]:
  """The records before the first bad one, with lengths and checksums."""
  with path.open("rb") as file:
    while (head := file.read(_HEAD))[8:] == _checksum(head[:8]):
      length = int.from_bytes(head[:8], "little")
      body = file.read(min(length, num_bytes) + 4)
      if body[length:] != _checksum(body[:length]):
        return
      yield head + body


def _checksum(content: bytes) -> bytes:
  """The format's checksum, a CRC-32C with its bits rotated."""
  crc = google_crc32c.value(content)
  rotated = (crc >> 15 | crc << 17) + 0xA282EAD8
  return (rotated & 0xFFFFFFFF).to_bytes(4, "little")


def _to_png(image: np.ndarray) -> list[bytes]:
  """Width, height and content, as TensorBoard keeps an image."""
  file = io.BytesIO()
  Image.fromarray(image).save(file, "PNG")
  height, width, _ = image.shape
  return [b"%d" % width, b"%d" % height, file.getvalue()]
