"""Makes labelled completions for `data.preference_file` from results files.

    python -m data_pipelines.pair output_a.json output_b.json --out=FILE

For the files see `scoring.results`, for the labels `preferences.label_results`.
"""

from collections.abc import Sequence

from absl import app, flags, logging

from data_pipelines import flags as command_flags
from data_pipelines.preferences import label_results
from data_pipelines.validation import SettingError, to_path, user_errors

FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
  """Labels the files on the command line; exits 64 on a user error."""
  try:
    if len(argv) < 2 or not FLAGS.out:
      raise SettingError(
        f"results ({argv[1:]}) and out ({FLAGS.out!r}) must name files, as in "
        "output_a.json output_b.json --out=FILE."
      )
    with user_errors():
      results = [to_path("results file", name) for name in argv[1:]]
      out = to_path("out", FLAGS.out)
      data_dir = ""
      if FLAGS["data_dir"].present:
        data_dir = to_path("data_dir", FLAGS.data_dir)
    counts = label_results.label_results(results, out, data_dir=data_dir)
  except SettingError as error:
    command_flags.refuse(error)
  listed = ", ".join(f"{name} {count}" for name, count in counts.items())
  logging.info("Wrote %s: %s.", FLAGS.out, listed)


if __name__ == "__main__":
  flags.DEFINE_string("out", "", "File to write, JSON lines.")
  flags.DEFINE_string(
    "data_dir",
    "",
    "Folder from data_pipelines.prepare with the problems; DIR,DIR for those of"
    " data.dirs. Without it the results files describe the problems.",
  )
  logging.set_verbosity(logging.INFO)
  app.run(main, flags_parser=command_flags.parse)
