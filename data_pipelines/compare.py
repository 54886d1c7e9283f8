"""Is it better than before? Compares results files, or runs, on equal problems.

    python -m data_pipelines.compare BEFORE AFTER [--by=source,task] \
      [--report=FILE.html] [--scores=FILE] [--data_dir=DIR]

BEFORE and AFTER are results files (see `scoring.results`), workdirs of
`--mode=evaluate`, or several of these with commas between them, one per run or
seed. Prints the share of right answers before and after by our rules, the
difference with its interval and p-value, and which problems changed.
"""

from collections.abc import Sequence

from absl import flags

from data_pipelines.scoring import comparison
from data_pipelines.text import flags as command_flags
from data_pipelines.validation import require, user_errors


def main(arguments: Sequence[str]) -> None:
  """Compares what the command line names."""
  with user_errors():
    rule = "be two results files or workdirs, BEFORE and AFTER"
    require(len(arguments) == 2, "arguments", arguments, rule, "see --help")
    paths = command_flags.paths("report", "scores", "data_dir")
  text = comparison.compare_files(*arguments, by=flags.FLAGS.by, **paths)
  command_flags.print_text(text)


if __name__ == "__main__":
  flags.DEFINE_list("by", [], "Columns of metadata, for figures per slice.")
  flags.DEFINE_string("report", "", "File for a page of what changed, HTML.")
  flags.DEFINE_string("scores", "", "File for the figures as JSON.")
  flags.DEFINE_string(
    "data_dir",
    "",
    "Folder from data_pipelines.prepare with the problems and their images; "
    "DIR,DIR for those of data.dirs. Without it the results files describe the "
    "problems, and the page has no images.",
  )
  command_flags.run(main)
