"""Whatever a flag says, it is taken or refused in words; nothing else."""

import os
import pathlib
import random
import resource
import subprocess
import sys
import time

from absl import flags as absl_flags

from data_pipelines.validation import SettingError, user_errors
from grpo_tpu.config import defaults, flags, schema, sources
from grpo_tpu.distributed import fingerprint
from tests.fuzz import harness

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = sorted(fingerprint.flatten(defaults.get_config().to_dict()))
SECTIONS = ["data", "data.synthetic", "optimizer", "nothing", "seed.x", "", "."]
CONFIG = "--config=configs/smoke.py"
_NUMBERS = ("0", "-0", "1", "-1", "3", "0.5", "1e400", "nan", "inf", "-inf")
_LONG = ("9" * 400, "-" + "9" * 400, "9" * 5000, "1e" + "9" * 400, "a" * 5000)
_LITERALS = (
  *("None", "True", "false", "[]", "()", "(1,)", "('a',)", "((1,),)", "{}"),
  *("{'a': 1}", "{1: 2}", "(1", "(" * 300, "(" * 100_000, "-" * 20_000 + "1"),
  *("(None,)", "(nan,)", "(1e999,)", "('a', 1)", "(-1, 0)", "10**9", "0x10"),
  *("1_000", "١", "()()", "__import__('os').system('x')", f"({'9' * 400},)"),
)
_TEXTS = (
  *("", " ", "x", "\udcff", "\x1b[2J\r", "\u202e", "a\nb", "~", "~nobody/x"),
  *(
    "~/x",
    "/",
    "//",
    "..",
    "/dev/zero",
    "/dev/null",
    "/etc/passwd",
    "x/" * 999,
  ),
  *(
    "gs://b/x",
    "a://",
    "hf:",
    "hf:~nobody",
    "hf:/dev/zero",
    "run:@",
    "run:x@1",
  ),
  *("run:" + "a" * 300, "random:" + "9" * 5000, "random:١", "gguf:/dev/null"),
  *("gguf:/etc/passwd", "gemma:/dev/zero", "a:b", "os:system", "math:no"),
)
VALUES = (*_NUMBERS, *_LONG, *_LITERALS, *_TEXTS)


def read(words: list[str]) -> None:
  """Reads a command line as the program does, up to its data."""
  argv = ["grpo_tpu", CONFIG, "--workdir=w", *words]
  sys.argv[:] = argv
  absl_flags.FLAGS.unparse_flags()
  with user_errors():
    flags.parse(argv)
    config = schema.Config.from_config_dict(flags.CONFIG.value)
    workdir = flags.workdir()
    mode = flags.MODE.value
    sources.resolve(config, mode, workdir, flags.has_override)


def words_of(number: int) -> list[str]:
  """Input `number`: a few strange flags."""
  rng = random.Random(number)
  names = [f"config.{x}" for x in rng.choices(SETTINGS, k=20)]
  names += [f"config.{rng.choice(SECTIONS)}", "workdir", "mode", "config", "x"]
  return [
    f"{rng.choice(('--', '--', '-'))}{rng.choice(names)}={rng.choice(VALUES)}"
    for _ in range(rng.choice((1, 1, 2)))
  ]


def main(seconds: float) -> None:
  """Reads command lines for some seconds; prints how many."""
  resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
  end, number = time.monotonic() + seconds, 0
  while time.monotonic() < end:
    start, words = time.monotonic(), words_of(number)
    try:
      read(words)
    except SettingError as error:
      assert str(error)
    except BaseException as error:
      error.add_note(f"Input {number}: {words!r:.500}")
      raise
    taken = time.monotonic() - start
    assert taken < 30, f"input {number} took {taken} s: {words!r:.500}"
    number += 1
  print(number)


@harness.both_durations
def test_no_flag_ends_in_a_traceback(seconds, tmp_path):
  """In a process of its own, for flags are one set to a process."""
  result = subprocess.run(
    [sys.executable, "-m", "tests.fuzz.command_line_test", str(seconds)],
    cwd=ROOT,
    env=os.environ | {"HOME": str(tmp_path), "JAX_PLATFORMS": "none"},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr[-3000:]
  assert int(result.stdout) > 2


if __name__ == "__main__":
  main(float(sys.argv[1]))
