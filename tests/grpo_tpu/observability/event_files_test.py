"""Event files are written in the background, in order, and stop no run."""

import threading
import time

import numpy as np
import pytest

from grpo_tpu.observability import event_files, mirror, sample_files, writer


class MemoryEvents:
  """Stands in for CLU's writer, which takes TensorFlow's import to make."""

  def __init__(self):
    self.calls = []

  def flush(self):
    self.calls.append("flush")

  def close(self):
    self.calls.append("close")


@pytest.fixture
def opening(monkeypatch):
  """A writer that opens when the test sets the event."""
  events, is_over = MemoryEvents(), threading.Event()

  def open_events(*_):
    assert is_over.wait(timeout=60)
    return events

  monkeypatch.setattr(event_files, "_open_events", open_events)
  return events, is_over


def test_nothing_waits_for_the_import_and_nothing_is_lost(tmp_path, opening):
  events, is_over = opening
  files = event_files.EventFiles(tmp_path, resume_step=None)
  for step in range(100):
    files.write(lambda events, step=step: events.calls.append(step))
  assert events.calls == []
  is_over.set()
  files.close()
  calls = [call for call in events.calls if call != "flush"]
  assert calls == [*range(100), "close"]


def test_metrics_are_on_disk_during_the_import(tmp_path, opening):
  _, is_over = opening
  with writer.Writer(tmp_path, is_writer=True, resume_step=None) as w:
    w.write(1, {"train/loss": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    is_over.set()
  assert text == '{"step": 1, "train/loss": 0.5}\n'


def test_a_failed_call_is_logged_and_the_next_one_made(
  tmp_path, opening, caplog
):
  events, is_over = opening
  is_over.set()
  files = event_files.EventFiles(tmp_path, resume_step=None)
  for _ in range(2):
    files.write(lambda events: events.no_such_call())
  files.write(lambda events: events.calls.append("next"))
  files.close()
  assert "next" in events.calls
  (record,) = caplog.records
  assert "1 writes failed, last: AttributeError" in record.getMessage()


def test_a_run_continues_if_the_files_cannot_be_opened(
  tmp_path, monkeypatch, caplog
):
  def open_events(*_):
    raise ImportError("no TensorFlow here")

  monkeypatch.setattr(event_files, "_open_events", open_events)
  with writer.Writer(tmp_path, is_writer=True, resume_step=None) as w:
    w.write(1, {"train/loss": 0.5})
    w.write(2, {"train/loss": 0.5})
  (record,) = caplog.records
  assert "1 writes failed, last: ImportError('no TensorFlow" in record.message
  assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_tensorboard_reads_every_step_once_after_a_kill_and_a_restart(tmp_path):
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  image = np.zeros((2, 2, 3), np.uint8)

  def run(steps, loss, resume_step):
    with writer.Writer(tmp_path, is_writer=True, resume_step=resume_step) as w:
      w.write_config({"seed": 1, "mesh": {"fsdp": 4}})
      for step in steps:
        columns = {"pid": "p", "completion": f"at {loss}", "answer": "3"}
        sample = sample_files.Sample(columns, "?", image)
        w.write(step, {"train/loss": loss})
        w.write_samples(step, [sample], split="train")

  def read(tag):
    accumulator = event_accumulator.EventAccumulator(
      str(tmp_path), size_guidance={"tensors": 0}
    )
    accumulator.Reload()
    return [
      (event.step, tensor_util.make_ndarray(event.tensor_proto))
      for event in accumulator.Tensors(tag)
    ]

  run(range(3), 9.0, None)  # An earlier run, which must leave nothing.
  run(range(1, 7), 1.0, None)
  (path,) = tmp_path.glob("events.out.tfevents.*")
  path.write_bytes(path.read_bytes()[:-10])
  # Within one second and process, files are told apart by a counter that
  # TensorBoard sorts as text; a restart takes longer.
  time.sleep(1.1)
  run(range(5, 9), 2.0, 4)

  losses = [(step, float(loss)) for step, loss in read("train/loss")]
  assert losses == [(s, 1.0 if s <= 4 else 2.0) for s in range(1, 9)]
  texts = [text.item().decode() for _, text in read("samples/train/0/text")]
  assert ["at 1.0" in text for text in texts] == [True] * 4 + [False] * 4
  images = read("samples/train/0/image")
  assert [step for step, _ in images] == list(range(1, 9))
  assert b"PNG" in images[0][1][2]
  assert '"fsdp": 4' in read("config")[0][1].item().decode()
  assert sorted(each.name.split(".")[0] for each in tmp_path.iterdir()) == [
    "events",
    "events",
    "metrics",
    "samples",
  ]


def test_tensorboard_sees_a_bucket_grow_and_a_resumed_run_repeats_no_step(
  bucket_here, tmp_path, monkeypatch
):
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  monkeypatch.setenv("HOME", str(tmp_path))
  workdir = "gs://bucket/runs/one"
  board = event_accumulator.EventAccumulator(
    workdir, size_guidance={"tensors": 0}
  )

  def read(accumulator):
    accumulator.Reload()
    events = accumulator.Tensors("train/loss")
    number = tensor_util.make_ndarray
    return sorted((x.step, float(number(x.tensor_proto))) for x in events)

  def run(steps, loss, resume_step):
    files = mirror.Mirror(workdir)
    files.fetch()
    with writer.Writer(
      files.folder, is_writer=True, resume_step=resume_step, is_mirrored=True
    ) as w:
      for step in steps:
        w.write(step, {"train/loss": loss})
        if step == 2:  # As if the file were large.
          time.sleep(1.1)  # See above.
          with pytest.MonkeyPatch.context() as patch:
            patch.setattr(event_files, "_ROLLED_BYTES", 0)
            w.flush()
        w.flush()
        files.wait(60)
        yield
    files.close()

  expected = []
  for step, _ in enumerate(run(range(5), 1.0, None)):
    expected.append((step, 1.0))
    assert read(board) == expected  # The same reader, while the run is on.
  time.sleep(1.1)  # See above.
  list(run(range(3, 6), 2.0, 2))
  expected = [(step, 1.0 if step < 3 else 2.0) for step in range(6)]
  fresh = event_accumulator.EventAccumulator(
    workdir, size_guidance={"tensors": 0}
  )
  assert read(fresh) == expected
  names = [x for _, x in bucket_here.store.objects if "tfevents" in x]
  assert len(names) == 3


@pytest.fixture(scope="module")
def events(tmp_path_factory):
  """The bytes of a file with an event of each step from 1 to 6."""
  import tensorflow as tf

  path = str(tmp_path_factory.mktemp("events") / "x")
  with tf.io.TFRecordWriter(path) as file:
    for step in range(1, 7):
      event = tf.compat.v1.Event(step=step, file_version=f"{step}" * 50)
      file.write(event.SerializeToString())
  with open(path, "rb") as file:
    return file.read()


def steps_of(path):
  import tensorflow as tf

  return [
    tf.compat.v1.Event.FromString(record.numpy()).step
    for record in tf.data.TFRecordDataset(str(path))
  ]


@pytest.mark.parametrize(
  ("damage", "kept"),
  [
    (lambda x, size: x, 4),
    (lambda x, size: x[: 2 * size] + bytes(size) + x[3 * size :], 2),
    (lambda x, size: x[: 3 * size] + b"\xff" * 8 + x[3 * size + 8 :], 3),
    (lambda x, size: x[: size + 7] + b"\x40" + x[size + 8 :], 1),
    (lambda x, size: x[: size + 30] + b"?" + x[size + 31 :], 1),
    (lambda x, size: x[: 2 * size - 1] + b"?" + x[2 * size :], 1),
    (lambda x, size: x[: 2 * size - 1], 1),
    (lambda x, size: b"", 0),
    (lambda x, size: b"noise" * 99, 0),
  ],
  ids=[
    *("whole", "zeros", "length", "high bit", "body", "last byte"),
    *("cut", "empty", "noise"),
  ],
)
def test_rewinding_ends_at_the_first_bad_record(
  tmp_path, events, damage, kept, caplog
):
  path = tmp_path / "events.out.tfevents.1"
  damaged = damage(events, len(events) // 6)
  path.write_bytes(damaged)
  event_files._rewind(path, 4)
  assert steps_of(path) == list(range(1, kept + 1))
  assert ("which a kill" in caplog.text) == (damaged not in (events, b""))
  assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_record_of_something_else_ends_rewinding(tmp_path, events):
  """Its checksums are right, and its content is no event."""
  import tensorflow as tf

  path = tmp_path / "events.out.tfevents.1"
  with tf.io.TFRecordWriter(str(path)) as file:
    file.write(b"\xff" * 20)
  record = path.read_bytes()
  path.write_bytes(events[: len(events) // 6] + record + events)
  event_files._rewind(path, 4)
  assert steps_of(path) == [1]


def test_a_file_that_cannot_be_rewound_costs_no_later_event(
  tmp_path, monkeypatch, caplog
):
  (tmp_path / "events.out.tfevents.1").mkdir()
  (tmp_path / "events.out.tfevents.2").write_bytes(bytes(100))
  with writer.Writer(tmp_path, is_writer=True, resume_step=3) as w:
    w.write(4, {"train/loss": 0.5})
  assert "tfevents.1 stays as it is" in caplog.text
  assert w.failures == 0
  files = [x for x in tmp_path.glob("events.*") if x.is_file()]
  assert 4 in [step for path in files for step in steps_of(path)]
