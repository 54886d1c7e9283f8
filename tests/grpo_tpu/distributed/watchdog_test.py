"""The watchdog, in a separate process because it ends the process."""

import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
PROGRAM = """
import itertools, pathlib, sys, time
import jax
from grpo_tpu.distributed import watchdog

def loop_for(seconds):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    pass

def compiled():
  jax.monitoring.record_event_duration_secs(
    "/jax/core/compile/backend_compile_duration", 0.1
  )

with watchdog.Watchdog(
  pathlib.Path(sys.argv[1]) / "stacks.txt",
  seconds={seconds},
  start_seconds={start_seconds},
  report=lambda reason: print(reason, flush=True),
) as watch:
{body}
print("done")
"""


def run(tmp_path, body, *, seconds=1.0, start_seconds=1.0):
  code = PROGRAM.format(
    seconds=seconds,
    start_seconds=start_seconds,
    body=textwrap.indent(textwrap.dedent(body), "  "),
  )
  return subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_a_loop_without_progress_ends_with_76_and_shows_where(tmp_path):
  result = run(tmp_path, "loop_for(60)")
  assert result.returncode == 76
  assert "no progress for more than the 1 s" in result.stdout
  for words in (result.stderr, (tmp_path / "stacks.txt").read_text()):
    assert "loop_for" in words and "most recent call first" in words


@pytest.mark.parametrize(
  ("body", "settings"),
  [
    (
      "for number in range(32):\n  loop_for(0.1)\n"
      "  watch.mark() if number < 16 else compiled()",
      {},
    ),
    ("loop_for(2)", {"start_seconds": 60.0}),
    ("loop_for(2)", {"seconds": 0.0, "start_seconds": 0.0}),
  ],
  ids=["progress", "the first step", "off"],
)
def test_progress_or_a_longer_limit_keeps_the_process_alive(
  tmp_path, body, settings
):
  result = run(tmp_path, body, **{"seconds": 1.0, **settings})
  assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
  assert "Traceback" not in result.stderr


def test_the_longer_limit_ends_with_the_first_step(tmp_path):
  body = "watch.end_startup()\nloop_for(60)"
  assert run(tmp_path, body, start_seconds=600.0).returncode == 76


def test_a_thread_that_never_releases_the_interpreter_is_ended_too(tmp_path):
  """No thread of ours can run, and Python itself exits with 1."""
  body = """
  def hold():
    sum(itertools.repeat(0))
  time.sleep(0.5) # The watchdog runs.
  hold()
  """
  result = run(tmp_path, body, seconds=2.0, start_seconds=2.0)
  assert result.returncode == 1
  assert "Timeout" in result.stderr and "in hold" in result.stderr
