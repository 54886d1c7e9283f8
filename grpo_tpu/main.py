"""The program: `python -m grpo_tpu --config=FILE --workdir=DIR`.

Heavy imports wait, so that --help and a wrong setting answer at once.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from absl import app

from data_pipelines.validation import user_errors
from grpo_tpu.config import flags, usage
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import interrupt


def cli() -> None:
  """Reads the flags and runs the program."""
  interrupt.listen()
  app.run(main, flags_parser=usage.parse_flags)


def main(_: Sequence[str]) -> None:
  """Checks every setting, then starts devices, then runs the mode."""
  from grpo_tpu.observability import exit_report

  report = exit_report.ExitReport()
  try:
    with user_errors():
      config = Config.from_config_dict(flags.CONFIG.value)
      address = flags.process_address()
      config = _resolve(config)
      run, identity = _open_mode(config, report)
    if flags.MODE.value != "plan":
      _start_devices(config, address, identity)
    report.what_next = run() or ""
    report.report_done()
  except BaseException as error:
    report.exit_with(error)


def _resolve(config: Config) -> Config:
  """The settings with the weights and the data that the mode reads."""
  from grpo_tpu.config import sources

  return sources.resolve(
    config,
    flags.MODE.value,
    flags.workdir(),
    has_weights_flag=flags.has_override("model.weights"),
  )


def _open_mode(config: Config, report: Any) -> tuple[Callable, Mapping]:
  """The mode, ready to run, and the fingerprints of the data it opened."""
  mode, workdir = flags.MODE.value, flags.workdir()
  if mode == "plan":
    from grpo_tpu.planning import plan

    run = partial(plan.run, advise=flags.ADVISE.value)
    return partial(run, config, workdir, flags.TOPOLOGY.value), {}
  if mode == "export":
    from grpo_tpu.checkpoint import export

    export.check(config.model, config.export, workdir)
    parts = config.model, config.export, config.mesh
    return partial(export.run, *parts, workdir), {}
  from data_pipelines import dataset
  from grpo_tpu.evaluation import eval_sets, evaluate
  from grpo_tpu.train import loop

  data = dataset.open_dataset(
    config.data,
    config.model_inputs,
    workdir,
    for_training=mode == "train",
    seed=config.seed,
  )
  sets = eval_sets.open_sets(config, data)
  identity = {k: x for each in sets.values() for k, x in each.identity.items()}
  if mode == "evaluate":
    return partial(evaluate.run, config, workdir, data), identity
  eval_sets.check_targets(config, sets)
  return partial(loop.train, config, workdir, data, report), identity


def _start_devices(config: Config, address: Any, identity: Mapping) -> None:
  from grpo_tpu.distributed import compile_cache, initialize, preflight

  compile_cache.enable_persistent_cache(config.compilation_cache_dir)
  initialize.initialize(config.distributed, address)
  common = {"--mode": flags.MODE.value, "--workdir": flags.workdir()}
  facts = preflight.facts(config.to_dict(), identity, common)
  limit = config.distributed.preflight_timeout_seconds
  preflight.check("start", facts, timeout_seconds=limit)


if __name__ == "__main__":
  cli()
