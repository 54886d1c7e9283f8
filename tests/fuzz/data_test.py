"""Pictures, sources of problems, results and preferences, on damaged copies.

For a second each, or for as long as FUZZ_SECONDS says; nightly for minutes.
"""

import contextlib
import dataclasses
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipelines import images, records
from data_pipelines.preferences import completions, label_results
from data_pipelines.scoring import score_file
from data_pipelines.sources import files, stored
from data_pipelines.validation import SettingError
from data_pipelines.verifier import verify
from tests.data_pipelines.sources import files_test
from tests.fuzz import harness

FORMATS = {
  "PNG": {},
  "JPEG": {},
  "progressive JPEG": {"progressive": True},
  "WEBP": {},
  "lossless WEBP": {"lossless": True},
  "GIF": {},
  "BMP": {},
  "TIFF": {},
  "LZW TIFF": {"compression": "tiff_lzw"},
  "JPEG TIFF": {"compression": "jpeg"},
  "deflate TIFF": {"compression": "tiff_adobe_deflate"},
  # These are refused.
  "AVIF": {},
  "EPS": {},
}


def encoded(name):
  """Pictures in a format: one with pages where there can be some."""
  pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
  image, format = Image.fromarray(pixels), name.split()[-1]
  exif = Image.Exif()
  exif[0x0112] = 6
  choices = [{} if format in ("BMP", "EPS") else {"exif": exif}]
  if format in ("PNG", "GIF", "WEBP", "TIFF", "AVIF"):
    choices.append({"save_all": True, "append_images": [image.rotate(90)]})
  for options in choices:
    file = io.BytesIO()
    image.save(file, format, **FORMATS[name], **options)
    yield file.getvalue()


@pytest.mark.parametrize("name", FORMATS)
@harness.both_durations
def test_a_picture_is_decoded_or_a_bad_record(name, seconds, monkeypatch):
  monkeypatch.setenv("PATH", "")

  def read(content):
    try:
      images.num_crops(content, dataclasses.replace(images.WHOLE, enabled=True))
      image = images.decode(content)
    except records.BadRecord as error:
      assert error.reason in ("undecodable_image", "image_too_large")
      assert len(str(error)) < 400
    else:
      assert image.ndim == 3 and image.shape[2] == 3
      assert image.size <= 3 * images.MAX_PIXELS

  # A picture of 50 megapixels is within the limits.
  limits = {"call_seconds": 30.0, "extra_bytes": 3 << 30}
  harness.fuzz(
    read, list(encoded(name)), seconds / len(FORMATS), allowed=(), **limits
  )


def check_source(folder):
  """Reads a source: each record is a problem that can be stored, or bad."""
  try:
    found = files.find(folder)
    for reader in found.readers.values():
      for raw in reader():
        problem = files_test.problem(raw)
        if isinstance(problem, records.BadRecord):
          assert len(problem.detail) <= 300 and problem.detail.isprintable()
          continue
        with contextlib.suppress(records.BadRecord):
          records.validate(problem)
          stored.encode(problem)
          verify.verify(f"<answer>{problem.answer}</answer>", problem)
  except SettingError as error:
    assert str(folder) in str(error)


@harness.both_durations
def test_records_of_testmini_are_kept_or_rejected(tmp_path, seconds):
  entries = {
    "1": files_test.ENTRY,
    "2": files_test.ENTRY
    | {"question_type": "multi_choice", "answer_type": "text"}
    | {"choices": ["3", "4"], "metadata": {"skills": ["a"], "source": "TQA"}},
    "3": files_test.ENTRY
    | {"answer_type": "float", "precision": 1, "answer": "0.5", "unit": "g"},
  }
  folder = files_test.github(tmp_path, entries)

  def read(content):
    (folder / "testmini.json").write_bytes(content)
    check_source(folder)

  harness.fuzz(read, [json.dumps(entries).encode()], seconds, allowed=())


@harness.both_durations
def test_rows_of_parquet_are_kept_or_rejected(tmp_path, seconds):
  folder = files_test.parquet(tmp_path / "valid", ("1", "2", "3"))
  (path,) = folder.iterdir()
  plain = io.BytesIO()
  pq.write_table(
    pq.read_table(path), plain, compression="none", use_dictionary=False
  )
  valid = [path.read_bytes(), plain.getvalue()]

  def read(content):
    path.write_bytes(content)
    check_source(folder)

  harness.fuzz(read, valid, seconds, allowed=(), extra_bytes=2 << 30)


@pytest.mark.parametrize(
  "kind", ["parquet", "Arrow file", "Arrow stream", "JSON", "CSV", "tar"]
)
@harness.both_durations
def test_rows_of_each_kind_are_read_or_refused(tmp_path, kind, seconds):
  files_test.WRITERS[kind](tmp_path / "a", files_test.ROWS)
  (path,) = tmp_path.iterdir()

  def read(content):
    path.write_bytes(content)
    try:
      found = files.find(path)
      for row in found.readers[""]():
        if isinstance(row, files.Row):
          assert all(isinstance(name, str) for name in row.values)
          json.dumps(row.values, default=repr)
        else:
          assert len(row.detail) <= 300 and row.detail.isprintable()
    except SettingError as error:
      assert str(path) in str(error) and len(str(error)) < 1000

  valid = [path.read_bytes()]
  harness.fuzz(read, valid, seconds / 4, allowed=(), extra_bytes=2 << 30)


RESULT = {
  **files_test.ENTRY,
  "metadata": {"source": "TQA", "skills": ["a", "b"], "grade": "x"},
  "response": "The answer is 3.",
  "extraction": "3",
  "true_false": True,
}


@harness.both_durations
def test_results_are_scored_and_paired_or_refused(tmp_path, seconds):
  path, other = tmp_path / "a.json", tmp_path / "b.json"
  rows = {"1": RESULT, "2": {**RESULT, "response": "4", "pid": "2"}}
  other.write_text(json.dumps({"1": {**RESULT, "response": "7"}}))

  def read(content):
    path.write_bytes(content)
    for act in (
      lambda: score_file.score_file(str(path), out=str(tmp_path / "out.json")),
      lambda: label_results.label_results([path, other], tmp_path / "pairs"),
    ):
      try:
        act()
      except SettingError as error:
        assert len(str(error)) < 2000 + len(str(path))

  harness.fuzz(read, [json.dumps(rows).encode()], seconds, allowed=())


@harness.both_durations
def test_preferences_are_read_or_refused(tmp_path, seconds):
  path = tmp_path / "preferences.jsonl"
  row = {"pid": "1"} | {
    "completions": [{"text": x, "label": 1.0} for x in "abc"]
  }
  problem = records.Problem(
    pid="1",
    question="?",
    answer="1",
    question_type="free_form",
    answer_type="integer",
  )

  def read(content):
    path.write_bytes(content)
    try:
      source = completions.from_file(path, 3)
    except ValueError as error:
      assert "data.preference_file" in str(error) and len(str(error)) < 1000
      return
    try:
      group = source(problem, np.random.default_rng(0))
    except records.BadRecord:
      return
    for text, label in group:
      assert text.encode() is not None and float(label) == label

  harness.fuzz(read, [json.dumps(row).encode()], seconds, allowed=())
