"""A full disk neither stops the run nor tears or loses a line."""

import os
import pathlib
import subprocess
import sys

import pytest

from grpo_tpu.observability import json_lines

ROOT = pathlib.Path(__file__).resolve().parents[3]


def test_a_full_disk_stops_nothing_tears_nothing_and_loses_nothing(tmp_path):
  """A limit on the file size stands for a full disk: it cuts a line."""
  code = """
import json, pathlib, resource, signal, sys
from grpo_tpu.observability import json_lines
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
lines = json_lines.JsonLines(folder / "x.jsonl", resume_step=None)
lines.append({"step": 0, "text": "a" * 50})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
for step in (1, 2):
  lines.append({"step": step, "text": "a" * 50})
assert lines.failures == 2, lines.failures
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
lines.append({"step": 3, "text": "a" * 50})
assert lines.failures == 2
rows = [json.loads(x) for x in (folder / "x.jsonl").read_text().splitlines()]
assert [row["step"] for row in rows] == [0, 1, 2, 3], rows
"""
  subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True
  )


FOREIGN = [
  *(b"5", b"[1]", b"{}", b"null", b'{"step": "a"}', b'{"step": true}'),
  *(b'{"note": "x"}', b"\xff", b"[" * 10**6, b'{"step": 1', b"", b"\x1b[2J"),
]


@pytest.mark.parametrize(
  "foreign", FOREIGN, ids=lambda x: x[:9].decode("utf8", "replace")
)
def test_a_line_of_others_is_removed_and_ends_nothing(
  tmp_path, foreign, caplog
):
  path = tmp_path / "x.jsonl"
  rows = [b'{"step": %d}' % step for step in range(5)]
  path.write_bytes(b"\n".join([*rows[:2], foreign, *rows[2:], foreign, b""]))
  json_lines.JsonLines(path, resume_step=3).close()
  assert path.read_bytes() == b"".join(row + b"\n" for row in rows[:4])
  (record,) = caplog.records
  assert "removed 2 lines that are not complete rows" in record.getMessage()
  assert record.getMessage().isprintable()
  assert (
    foreign.decode("utf-8", "replace")[:3].strip("\x1b[") in record.getMessage()
  )


def test_lines_of_the_run_alone_need_no_warning(tmp_path, caplog):
  path = tmp_path / "x.jsonl"
  path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
  json_lines.JsonLines(path, resume_step=1).close()
  assert path.read_bytes() == b'{"step": 1}\n'
  assert not caplog.records


def test_a_pipe_in_place_of_the_file_is_replaced(tmp_path):
  path = tmp_path / "x.jsonl"
  os.mkfifo(path)
  assert list(json_lines.read_rows(path)) == []
  lines = json_lines.JsonLines(path, resume_step=3)
  lines.append({"step": 4})
  lines.close()
  assert path.is_file() and path.read_bytes() == b'{"step": 4}\n'
