"""Scores a results file by rules alone, offline.

    python -m data_pipelines.score output_testmini.json [--out=FILE] \
      [--scores=FILE]

Reads MathVista's results format (see `scoring.results`) and prints the share of
right records, overall and by type of problem: by our verifier on the `response`
(strict), by the rule of the problems' own set (official; on the `extraction`
that an external program has stored, if there is one), and by the file's own
`true_false` (stored). Intervals are 95 % Wilson intervals. Multiple choice is
also shown above chance: 0 for guessing, 100 for all right.

`--out` writes the records, keyed by pid, with `strict_answer` and
`strict_true_false` added; `--scores` writes the figures as JSON.
"""

import signal
from collections.abc import Sequence

from absl import app, flags

from data_pipelines import flags as command_flags
from data_pipelines.scoring import score_file
from data_pipelines.validation import SettingError, to_path, user_errors

FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
  """Scores the file on the command line; exits 64 on a user error."""
  try:
    if len(argv) != 2:
      raise SettingError(
        f"arguments ({argv[1:]}) must be one results file; see --help."
      )
    # A reader that ends early, such as head, ends this program in silence.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with user_errors():
      file = to_path("results file", argv[1])
      outputs = {
        name: str(to_path(name, getattr(FLAGS, name)))
        for name in ("out", "scores")
        if FLAGS[name].present
      }
    print(score_file.score_file(str(file), **outputs))
  except SettingError as error:
    command_flags.refuse(error)


if __name__ == "__main__":
  flags.DEFINE_string("out", "", "File for the records with strict answers.")
  flags.DEFINE_string("scores", "", "File for the figures as JSON.")
  app.run(main, flags_parser=command_flags.parse)
