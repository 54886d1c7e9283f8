"""Is it better than before? Compares results files, or runs, on equal problems.

    python -m data_pipelines.compare BEFORE AFTER [--by=source,task] \
      [--report=FILE.html] [--scores=FILE] [--data_dir=DIR]

BEFORE and AFTER are results files (see `scoring.results`), workdirs of
`--mode=evaluate`, or several of these with commas between them, one per run or
seed. Prints the share of right answers before and after by our rules, the
difference with its interval and p-value, and which problems changed.
"""

import signal
from collections.abc import Sequence

from absl import app, flags

from data_pipelines import flags as command_flags
from data_pipelines.scoring import comparison
from data_pipelines.validation import SettingError, to_path, user_errors

FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
  """Compares what the command line names; exits 64 on a user error."""
  try:
    if len(argv) != 3:
      raise SettingError(
        f"arguments ({argv[1:]}) must be two results files or workdirs, BEFORE "
        "and AFTER; see --help."
      )
    # A reader that ends early, such as head, ends this program in silence.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with user_errors():
      paths = {
        name: str(to_path(name, getattr(FLAGS, name)))
        for name in ("report", "scores", "data_dir")
        if FLAGS[name].present
      }
    _, before, after = argv
    text = comparison.compare_files(before, after, by=FLAGS.by, **paths)
    print(text, end="")
  except SettingError as error:
    command_flags.refuse(error)


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
  app.run(main, flags_parser=command_flags.parse)
