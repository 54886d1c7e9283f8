"""The one program: `python -m grpo_tpu.main --config=FILE --workdir=DIR`.

Exit codes: 0 done; 64 a bad setting, flag or data set; 1 anything else.
"""

import functools
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from grpo_tpu import config as run_config
from grpo_tpu import logs
from grpo_tpu.rewards import scoring

_BAD_REQUEST = 64  # EX_USAGE of sysexits.h.

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Settings of the run.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run keeps all it writes.", required=True
)
_MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "evaluate", "export"],
  "train to train.num_steps; evaluate model.weights on data.eval_split; export"
  " the workdir's newest checkpoint, or model.weights, for Hugging Face.",
)


def main(argv: Sequence[str]) -> None:
  """Checks every setting, then starts devices, then runs the mode."""
  try:
    with run_config.refutable():
      if len(argv) > 1:
        raise ValueError(f"{argv[1]!r} is not a flag; write --name=value.")
      config = run_config.Config.from_config_dict(_CONFIG.value)
      # Heavy imports wait until the settings are known to be good.
      from grpo_tpu import (
        compilation,
        dataset,
        distributed,
        evaluate,
        export,
        train,
      )

      mode, workdir = _MODE.value, _WORKDIR.value
      if mode == "export":
        export.check(config, workdir)
        run = functools.partial(export.run, config, workdir)
      else:
        data = dataset.open_dataset(
          config, workdir, for_training=mode == "train"
        )
        act = train.train if mode == "train" else evaluate.run
        run = functools.partial(act, config, workdir, data)
    compilation.keep_in(config.compilation_cache_dir)
    distributed.initialize()
    run()
  except run_config.SettingError as error:
    _refuse(str(error))
  finally:
    scoring.close()


def _parse(argv: Sequence[str]) -> list[str]:
  """The flags, or the exit code of a bad request where absl would take 1."""
  logs.silence_libraries()
  flags.mark_flag_as_required("config")
  try:
    arguments = flags.FLAGS(list(argv))
    # A config file that is not there raises when it is first looked into.
    _CONFIG.value.items()
    return arguments
  except Exception as error:  # Of whatever kind: this only reads settings.
    # Or absl would say that it is too early to log.
    flags.FLAGS.mark_as_parsed()
    _refuse(_in_full(error, argv))


def _in_full(error: Exception, argv: Sequence[str]) -> str:
  """What is wrong with the flags, of which the libraries say only a part."""
  if isinstance(error, OSError):
    reason = str(error).splitlines()[-1].strip()
    return f"--config must name a file, such as configs/smoke.py: {reason}."
  if isinstance(error, flags.Error):
    # A config file's own error comes with its trace, whose end says it all.
    flag, _, trace = str(error).partition("Error whilst parsing config file")
    return flag + "".join(trace.splitlines()[-1:])
  cause = error.args[0] if error.args else error
  reason = " ".join(str(getattr(cause, "args", [cause])[0]).split())
  overrides = " ".join(x for x in argv if x.startswith("--config."))
  return (
    f"{overrides} must name settings of configs/base.py, but not all do: "
    f"{reason}"
  )


def _refuse(message: str) -> NoReturn:
  logging.error("%s", message)
  sys.exit(_BAD_REQUEST)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
