"""Makes labelled completions for `data.preference_file` from results files.

    python -m data_pipelines.pair output_a.json output_b.json --out=FILE

For the files see `scoring.results`, for the labels `preferences.label_results`.
"""

from collections.abc import Sequence

from absl import flags, logging

from data_pipelines.preferences import label_results
from data_pipelines.storage.paths import to_path
from data_pipelines.text import flags as command_flags
from data_pipelines.validation import require, user_errors


def main(arguments: Sequence[str]) -> None:
  """Labels the files on the command line."""
  with user_errors():
    files = [to_path("results file", name) for name in arguments]
    rule = "name files, as in output_a.json output_b.json --out=FILE"
    require(bool(files), "arguments", arguments, rule, "see --help")
    out = to_path("out", flags.FLAGS.out)
    data_dir = command_flags.paths("data_dir")
  counts = label_results.label_results(files, out, **data_dir)
  listed = ", ".join(f"{name} {count}" for name, count in counts.items())
  logging.info("Wrote %s: %s.", out, listed)


if __name__ == "__main__":
  flags.DEFINE_string("out", "", "File to write, JSON lines.")
  flags.DEFINE_string(
    "data_dir",
    "",
    "Folder from data_pipelines.prepare with the problems; DIR,DIR for those of"
    " data.dirs. Without it the results files describe the problems.",
  )
  logging.set_verbosity(logging.INFO)
  command_flags.run(main)
