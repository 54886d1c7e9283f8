"""Files from elsewhere are read within limits and refused in words."""

import os
import tracemalloc

import pytest

from data_pipelines.storage.paths import to_path
from data_pipelines.text import untrusted
from data_pipelines.validation import printable


@pytest.mark.parametrize(
  "text, rule",
  [
    ("[" * 10**6, "nests too deeply"),
    ('{"a":' * 10**6, "nests too deeply"),
    ("[1]", "must be an object"),
    ("null", "must be an object"),
    ("{", "is not JSON"),
    (b'{"a": "\xff"}', "is not JSON"),
    ('{"a": ' + "1" * 5000 + "}", "is not JSON"),
    ("", "is not JSON"),
  ],
)
def test_any_text_is_an_object_or_a_value_error(text, rule):
  with pytest.raises(ValueError, match=rule) as error:
    untrusted.parse_json(text, "the index")
  assert str(error.value).startswith("the index ")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "value, kind",
  [(True, int), ("1", int), (1.0, int), (1, str), ([], dict), (None, bool)],
)
def test_a_field_of_another_type_is_named(value, kind):
  with pytest.raises(ValueError, match="'size' in the index must be"):
    untrusted.get_field({"size": value}, "size", kind, "the index")


def test_a_missing_field_is_named():
  with pytest.raises(ValueError, match="the index must have a field 'size'"):
    untrusted.get_field({}, "size", int, "the index")


def test_an_integer_is_a_number():
  assert untrusted.get_field({"size": 3}, "size", float, "the index") == 3


@pytest.mark.parametrize(
  "text", ["NaN", "-Infinity", "1e999", "1" * 400, "true"]
)
def test_a_number_is_finite(text):
  document = untrusted.parse_json(f'{{"size": {text}}}', "the index")
  with pytest.raises(ValueError, match="'size' in the index must be a finite"):
    untrusted.get_field(document, "size", float, "the index")


def test_the_first_item_of_another_type_is_named():
  untrusted.check_items(["a", "b"], str, "names")
  with pytest.raises(ValueError, match="item 1 of names must be a string, not"):
    untrusted.check_items(["a", 3, 4], str, "names")


@pytest.mark.parametrize(
  "value",
  ["a" * 10**6, 10**5000, "\x1b\u202e" * 9],
  ids=["long", "digits", "escapes"],
)
def test_a_value_in_an_error_is_short_and_printable(value):
  nested = [value]
  for _ in range(100_000):
    nested = [nested]
  for shown in (untrusted.shorten(value), untrusted.shorten(nested)):
    assert len(shown) <= 60 and shown.isascii() and shown.isprintable()


def test_a_small_file_takes_little_memory_whatever_the_limit(tmp_path):
  (tmp_path / "file").write_bytes(b"12345")
  tracemalloc.start()
  assert untrusted.read_bytes(tmp_path / "file", 1 << 30) == b"12345"
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1 << 20


def test_only_regular_files_within_the_limit_are_read(tmp_path):
  (tmp_path / "file").write_bytes(b"12345")
  (tmp_path / "link").symlink_to(tmp_path / "file")
  (tmp_path / "zero").symlink_to("/dev/zero")
  os.mkfifo(tmp_path / "pipe")
  assert untrusted.read_bytes(tmp_path / "link", 5) == b"12345"
  with pytest.raises(ValueError, match="5 bytes, which must be at most 4"):
    untrusted.read_bytes(tmp_path / "file", 4)
  for name in ("zero", "pipe", "."):
    with pytest.raises(ValueError, match="must be a regular file"):
      untrusted.read_bytes(tmp_path / name, 100)


def test_what_a_terminal_obeys_is_escaped_and_other_text_is_not():
  obeyed = "\x1b[2J\r\x85\u2028\u2029\u202e\ud800\x00\n"
  shown = printable(obeyed)
  assert shown.isascii() and shown.isprintable()
  plain = "naïve 日本語 \u0645\u06cc\u200c\u062e \u00a0 👩\u200d🔬"
  assert printable(plain) == plain
  assert printable("a\nb\r", keep="\n") == "a\nb\\r"


def test_a_path_expands_the_home_and_is_never_empty(monkeypatch):
  monkeypatch.setenv("HOME", "/home/someone")
  assert str(to_path("--workdir", "~/run")) == "/home/someone/run"
  assert str(to_path("--workdir", "run")) == "run"
  for empty in ("", "  "):
    with pytest.raises(ValueError, match=r"--workdir \('.*'\) must name"):
      to_path("--workdir", empty)
