"""The flags of the program, or in one sentence what is wrong with them."""

from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from grpo_tpu.distributed import initialize

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Settings of the run.", lock_config=True
)
WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where the run keeps all it writes.", required=True
)
flags.register_validator(
  "workdir",
  lambda value: value is None or "://" not in value,
  "must be a folder, for a run appends to files and renames them: mount the"
  " bucket, as launch/tpu.sh does with gcsfuse, and name its folder.",
)
MODE = flags.DEFINE_enum(
  "mode",
  "train",
  ["train", "evaluate", "export", "plan"],
  "train to train.num_steps; evaluate model.weights on data.eval_split; export"
  " the workdir's newest checkpoint, or model.weights, for Hugging Face; plan"
  " --topology, without touching a device.",
)
TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "Of --mode=plan: the slice to plan for, as in v5e:4x4; v5e:4x4*2 is two.",
)
ADVISE = flags.DEFINE_bool(
  "advise",
  False,
  "Of --mode=plan: look for the largest step that fits, and say its settings.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator_address",
  None,
  "HOST:PORT of process 0 of several, or JAX_COORDINATOR_ADDRESS; on a TPU pod"
  " its metadata say it.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many there are, or JAX_NUM_PROCESSES."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which of them this is, or JAX_PROCESS_ID."
)


def place() -> initialize.ProcessAddress | None:
  """Where this process joins others, if flags or environment say so.

  Raises:
    ValueError: They say a part only, or what cannot be.
  """
  return initialize.read_process_address(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )


def parsed(argv: Sequence[str]) -> list[str]:
  """What is left of the arguments once all flags have their values.

  Args:
    argv: The arguments, the program's name first.

  Raises:
    ValueError: Saying what is wrong with which flag or setting.
  """
  flags.mark_flag_as_required("config")
  try:
    arguments = flags.FLAGS(list(argv))
    # A config file that is not there raises when it is first looked into.
    CONFIG.value.items()
    return arguments
  except Exception as error:  # Of whatever kind: this only reads settings.
    # Or absl would say that it is too early to log.
    flags.FLAGS.mark_as_parsed()
    raise ValueError(_in_full(error, argv)) from error


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
