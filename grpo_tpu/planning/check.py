"""Checks a command line on a machine that will not run it.

`python -m grpo_tpu.planning.check` takes the program's flags, and with
--topology the slice that the mesh must cover. It ends with exit code 0, or with
64 and the reason. It starts no device, and of the files that the command names
it opens the config alone, because weights and data may be on another machine.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.validation import (
  ExitCode,
  SettingError,
  printable,
  user_errors,
)
from grpo_tpu.config import flags, parse, sources
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import hardware
from grpo_tpu.models.settings import ModelSettings
from grpo_tpu.planning import changes


def check(argv: Sequence[str]) -> None:
  """Raises a SettingError if the program would refuse its flags or settings."""
  with user_errors():
    flags.parse(argv)
    config = Config.from_config_dict(_without_files(flags.CONFIG.value))
    if flags.MODE.value == "train":
      # The other modes may find all that they read in the workdir.
      sources.resolve(config, "train", flags.workdir(), flags.has_override)
    if flags.TOPOLOGY.value is not None:
      topology = hardware.parse_topology(flags.TOPOLOGY.value)
      changes.check_mesh(config, topology)


def _without_files(values: Any) -> Mapping[str, Any]:
  """The settings, with weights whose files are not looked for."""
  settings = values.to_dict()
  model = parse.build_section(ModelSettings, settings["model"], "model.")
  if not model.weights.startswith(("random:", "run:")) and model.weights:
    settings["model"]["weights"] = "run:elsewhere"
  return settings


def main(argv: Sequence[str]) -> int:
  """Prints the reason of a refusal; returns the exit code."""
  try:
    check(argv)
  except SettingError as error:
    sys.stderr.write(printable(str(error), keep="\n") + "\n")
    return ExitCode.BAD_INPUT
  return ExitCode.DONE


if __name__ == "__main__":
  sys.exit(main(sys.argv))
