"""A header is read as the gguf package reads it, or refused at once."""

import struct

import pytest

from data_pipelines.text import gguf_header

STRING, ARRAY = 8, 9


def text(value):
  content = value if isinstance(value, bytes) else value.encode()
  return struct.pack("<Q", len(content)) + content


def header(*parts, keys=0, tensors=0, version=3):
  return struct.pack("<4sIQQ", b"GGUF", version, tensors, keys) + b"".join(
    parts
  )


def entry(key, kind, value):
  return text(key) + struct.pack("<I", kind) + value


def array(kind, count, content=b""):
  return struct.pack("<IQ", kind, count) + content


def tensor(name, *dims, kind=0, offset=0):
  return text(name) + struct.pack(
    f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset
  )


@pytest.fixture
def read(tmp_path):
  def read(content):
    (tmp_path / "x.gguf").write_bytes(content)
    return gguf_header.read(tmp_path / "x.gguf", "the file")

  return read


def test_the_header_is_that_of_the_package(tmp_path):
  gguf = pytest.importorskip("gguf", reason="the extra export is missing")
  np = pytest.importorskip("numpy")
  path = tmp_path / "x.gguf"
  writer = gguf.GGUFWriter(path, "gemma3")
  writer.add_uint8("u8", 255)
  writer.add_int8("i8", -1)
  writer.add_uint16("u16", 65535)
  writer.add_int16("i16", -2)
  writer.add_int32("i32", -3)
  writer.add_uint64("u64", 2**64 - 1)
  writer.add_int64("i64", -4)
  writer.add_float32("f32", 0.25)
  writer.add_float64("f64", 0.1)
  writer.add_bool("yes", True)
  writer.add_bool("no", False)
  writer.add_string("text", "é \u2581")
  writer.add_array("texts", ["a", "", "bc"])
  writer.add_array("numbers", [1.5, -2.5])
  writer.add_array("flags", [True, False])
  writer.add_custom_alignment(64)
  writer.add_tensor("a", np.arange(6, dtype=np.float32).reshape(2, 3))
  writer.add_tensor("b", np.arange(4, dtype=np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  theirs = gguf.GGUFReader(path)
  ours = gguf_header.read(path, "the file")
  assert ours.metadata == {
    name: field.contents()
    for name, field in theirs.fields.items()
    if not name.startswith("GGUF.")
  }
  assert ours.num_bytes == path.stat().st_size
  assert ours.tensors == {
    x.name: gguf_header.Tensor(
      int(x.tensor_type),
      tuple(reversed(x.shape.tolist())),
      x.data_offset,
    )
    for x in theirs.tensors
  }
  assert ours.tensors["a"].start % 64 == 0


@pytest.mark.parametrize(
  ("content", "rule"),
  [
    (b"", "is empty"),
    (b"GGML" + bytes(40), "does not begin with the word GGUF"),
    (header(version=1), "format version 1"),
    (header(version=3 << 24), "format version 50331648"),
    (header(keys=2**64 - 1), "0 of its header are left"),
    (header(tensors=2**64 - 1), "0 of its header are left"),
    (header(entry("k", 0, b""), keys=1), "takes 1 bytes, and 0 of"),
    (header(text("k" * 9)[:-1], keys=1), "takes 9 bytes, and 8 of"),
    (header(struct.pack("<Q", 2**40), keys=1), "takes 1099511627776 bytes"),
    (header(entry("k", STRING, struct.pack("<Q", 2**63)), keys=1), "'k' in"),
    (header(entry("k", ARRAY, array(0, 2**40)), keys=1), "1099511627776 bytes"),
    (header(entry("k", ARRAY, array(12, 2**61)), keys=1), "'k' in the file"),
    (header(entry("k", ARRAY, array(STRING, 2**40)), keys=1), "'k' in the"),
    (header(entry("k", ARRAY, array(ARRAY, 1, array(0, 0))), keys=1), "type 9"),
    (header(entry("k", 13, bytes(8)), keys=1), "is of type 13"),
    (header(entry("k", STRING, text(b"\xff")), keys=1), "text in UTF-8"),
    (header(entry(b"\xff", 0, b"1"), keys=1), "text in UTF-8"),
    (header(entry("k", 0, b"1") * 2, keys=2), "has key 'k' twice"),
    (header(tensor("t", 1) * 2, tensors=2), "has tensor 't' twice"),
    (header(tensor("t"), tensors=1), "has 0 axes"),
    (header(tensor("t", *[2**63] * 5), tensors=1), "has 5 axes"),
    (header(text("t") + b"\xff" * 4, tensors=1), "has 4294967295 axes"),
    (
      header(entry("general.alignment", 4, bytes(4)), keys=1),
      "power of two, not 0",
    ),
    (
      header(entry("general.alignment", STRING, text("a")), keys=1),
      "must be an integer, not 'a'",
    ),
    (header(entry("\x1b[2J", 99, b""), keys=1), r"'\\x1b\[2J' in"),
  ],
)  # fmt: skip
def test_what_the_file_cannot_hold_is_refused(read, content, rule):
  with pytest.raises(ValueError, match=rule) as error:
    read(content)
  assert "the file" in str(error.value)


def test_any_cut_of_a_header_is_refused(read):
  whole = header(
    entry("a", ARRAY, array(STRING, 2, text("x") + text("yz"))),
    entry("b", ARRAY, array(4, 2, struct.pack("<II", 1, 2))),
    tensor("t", 3, 2),
    keys=2,
    tensors=1,
  )
  found = read(whole)
  assert found.metadata == {"a": ["x", "yz"], "b": [1, 2]}
  assert found.tensors["t"].shape == (2, 3)
  for length in range(len(whole)):
    with pytest.raises(ValueError, match="the file"):
      read(whole[:length])
