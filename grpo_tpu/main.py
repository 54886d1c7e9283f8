"""The one program: `python -m grpo_tpu.main --config=FILE --workdir=DIR`.

Exit codes: 0 done; 64 a bad setting, flag or data set, or hosts that differ; 75
preempted and saved, start it again; 76 stuck; 1 anything else.
"""

import functools
from collections.abc import Sequence

from absl import app

from data_pipelines import validation
from grpo_tpu.config import flags
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import initialize, logs
from grpo_tpu.observability import exit_report


def main(argv: Sequence[str]) -> None:
  """Checks every setting, then starts devices, then runs the mode."""
  ending = exit_report.ExitReport()
  try:
    _run(argv, ending)
  except BaseException as error:
    ending.exit_with(error)


def _run(argv: Sequence[str], ending: exit_report.ExitReport) -> None:
  with validation.user_errors():
    if len(argv) > 1:
      raise ValueError(f"{argv[1]!r} is not a flag; write --name=value.")
    config = run_config.Config.from_config_dict(flags.CONFIG.value)
    place = flags.place()
    mode, workdir = flags.MODE.value, flags.WORKDIR.value
    # Heavy imports wait until the settings are known to be good.
    if mode == "plan":
      # Alone: it starts no devices, and reads no data.
      from grpo_tpu.planning import plan

      topology, advise = flags.TOPOLOGY.value, flags.ADVISE.value
      plan.run(config, workdir, topology, advise=advise)
      ending.report_done()
      return
    from data_pipelines import dataset
    from grpo_tpu.checkpoint import export
    from grpo_tpu.distributed import compile_cache, preflight
    from grpo_tpu.evaluation import evaluate
    from grpo_tpu.train import loop

    identity = {}
    if mode == "export":
      export.check(config.model, config.export, workdir)
      run = functools.partial(
        export.run,
        config.model,
        config.export,
        config.mesh,
        workdir,
      )
    else:
      data = dataset.open_dataset(
        config.data,
        config.model_inputs,
        workdir,
        for_training=mode == "train",
      )
      identity = data.identity
      run = functools.partial(evaluate.run, config, workdir, data)
      if mode == "train":
        run = functools.partial(loop.train, config, workdir, data, ending)
  compile_cache.enable_persistent_cache(config.compilation_cache_dir)
  initialize.initialize(config.distributed, place)
  with validation.user_errors():
    facts = preflight.facts(
      config.to_dict(), identity, mode=mode, workdir=workdir
    )
    timeout_seconds = config.distributed.preflight_timeout_seconds
    preflight.check("start", facts, timeout_seconds=timeout_seconds)
  run()
  ending.report_done()


def _parse(argv: Sequence[str]) -> list[str]:
  """The flags, or the exit code of a bad request where absl would take 1."""
  logs.silence_libraries()
  try:
    with validation.user_errors():
      return flags.parsed(argv)
  except validation.SettingError as error:
    exit_report.ExitReport().exit_with(error)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse)
