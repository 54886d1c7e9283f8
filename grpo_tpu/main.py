"""The one program: `python -m grpo_tpu.main --config=FILE --workdir=DIR`.

Exit codes: 0 done; 64 a bad setting, flag or data set; 1 anything else.
"""

import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from grpo_tpu import config as run_config

_BAD_REQUEST = 64  # EX_USAGE of sysexits.h.

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Settings of the run.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run keeps all it writes."
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "evaluate"],
  "train to train.num_steps; evaluate model.weights on data.eval_split.",
)


def main(argv: Sequence[str]) -> None:
  """Checks every setting, then starts devices, then runs the mode."""
  try:
    with run_config.refutable():
      if len(argv) > 1:
        raise ValueError(f"{argv[1]!r} is not a flag; write --name=value.")
      config = run_config.Config.from_config_dict(_CONFIG.value)
      # Heavy imports wait until the settings are known to be good.
      from grpo_tpu import dataset, distributed, evaluate, train

      data = dataset.open_dataset(config, _WORKDIR.value)
    distributed.initialize()
    if _MODE.value == "train":
      train.train(config, _WORKDIR.value, data)
    else:
      evaluate.run(config, _WORKDIR.value, data)
  except run_config.SettingError as error:
    _refuse(error)


def _parse(argv: Sequence[str]) -> list[str]:
  """The flags, or the exit code of a bad request where absl would take 1."""
  flags.mark_flags_as_required(["config", "workdir"])
  try:
    return flags.FLAGS(list(argv))
  except (
    flags.Error,
    AttributeError,  # An override of a setting there is none of,
    KeyError,
    TypeError,  # of a section,
    ValueError,  # with a value of another type;
    OSError,  # a config file that is not there.
  ) as error:
    _refuse(error)


def _refuse(error: Exception) -> NoReturn:
  logging.error("%s", error)
  sys.exit(_BAD_REQUEST)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
