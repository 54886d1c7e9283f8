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

from collections.abc import Sequence

from absl import flags

from data_pipelines.scoring import score_file
from data_pipelines.storage.paths import to_path
from data_pipelines.text import flags as command_flags
from data_pipelines.validation import require, user_errors


def main(arguments: Sequence[str]) -> None:
  """Scores the file on the command line."""
  with user_errors():
    rule = "be one results file"
    require(len(arguments) == 1, "arguments", arguments, rule, "see --help")
    file = str(to_path("results file", arguments[0]))
    outputs = command_flags.paths("out", "scores")
  table = score_file.score_file(file, **outputs)
  command_flags.print_text(f"{table}\n")


if __name__ == "__main__":
  flags.DEFINE_string("out", "", "File for the records with strict answers.")
  flags.DEFINE_string("scores", "", "File for the figures as JSON.")
  command_flags.run(main)
