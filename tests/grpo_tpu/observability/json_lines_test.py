"""A full disk neither stops the run nor tears or loses a line."""

import pathlib
import subprocess
import sys

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
