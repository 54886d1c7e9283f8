"""The program: `python -m grpo_tpu --config=FILE --workdir=DIR`.

Heavy imports wait, so that --help and a wrong setting answer at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import app

from data_pipelines.validation import user_errors
from grpo_tpu import modes
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
      config = modes.resolve(config)
      run, identity = modes.open_mode(config, report)
    if flags.MODE.value != "plan":
      _start_devices(config, address, identity)
    report.what_next = run() or ""
    report.report_done()
  except BaseException as error:
    report.exit_with(error)


def _start_devices(config: Config, address: Any, identity: Mapping) -> None:
  from grpo_tpu.distributed import compile_cache, initialize, preflight

  compile_cache.enable_persistent_cache(config.compilation_cache_dir)
  initialize.initialize(config.distributed, address)
  common = {"--mode": flags.MODE.value, "--workdir": flags.workdir()}
  facts = preflight.facts(config.to_dict(), identity, common)
  limit = config.distributed.preflight_timeout_seconds
  preflight.check("start", facts, timeout_seconds=limit)
  if flags.MODE.value != "answer":
    preflight.check_workdir("workdir", flags.workdir(), timeout_seconds=limit)


if __name__ == "__main__":
  cli()
