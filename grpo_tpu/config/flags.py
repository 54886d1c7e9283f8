"""The command-line flags of the program, and what is wrong with bad ones."""

import pathlib
import re
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from data_pipelines import validation
from data_pipelines.storage import paths
from grpo_tpu.config import defaults
from grpo_tpu.config.parse import describe_unknown

if typing.TYPE_CHECKING:
  from grpo_tpu.distributed import initialize

MODES = {
  "train": "Trains until `train.num_steps`; resumes the run in the workdir.",
  "evaluate": "Evaluates the newest checkpoint of the run in the workdir, or"
  " the `model.weights` named, on `data.eval_split`, and writes a report to the"
  " workdir.",
  "export": "Exports the newest checkpoint of the run in the workdir, or the"
  " `model.weights` named, in Hugging Face format.",
  "answer": "Answers a question about pictures, or those typed at a prompt,"
  " with the newest checkpoint of the run in the workdir, or the"
  " `model.weights` named, on one process. Asks as the run's training did,"
  " whatever the config file says. Writes the text to standard output as its"
  " tokens come, and nothing to the workdir.",
  "plan": "Plans the run for a slice: memory, work and bounds, without a TPU.",
}

CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, as in --config=configs/smoke.py. To change a setting for one"
  " run, give its value too, as in --config.train.num_steps=200.",
  lock_config=True,
)
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Folder for everything that the run writes, on a disk or in a bucket, as in"
  " --workdir=runs/smoke or --workdir=gs://BUCKET/runs/smoke."
  " --mode=answer needs none if `model.weights` are named.",
)
MODE = flags.DEFINE_enum("mode", "train", list(MODES), "One of the modes.")
TOPOLOGY = flags.DEFINE_string(
  "topology",
  None,
  "Slice to plan for, as in --topology=v5e:4x4; v5e:4x4*2 is two slices.",
)
ADVISE = flags.DEFINE_bool(
  "advise",
  False,
  "With --mode=plan, search for the largest step that fits, and print its"
  " settings.",
)
QUESTION = flags.DEFINE_string(
  "question",
  None,
  "With --mode=answer, the question. Its pictures stand where it has <image>,"
  " or first. By default the lines of standard input are the questions.",
)
IMAGES = flags.DEFINE_multi_string(
  "image", [], "With --mode=answer, the file of a picture"
)
TEMPERATURE = flags.DEFINE_float(
  "temperature",
  0.0,
  "With --mode=answer, the divisor of the logits; 0 takes the likeliest tokens",
  lower_bound=0.0,
)
SAMPLES = flags.DEFINE_integer(
  "samples",
  1,
  "With --mode=answer, the number of answers that `seed` draws",
  *(1, 1000),
)
_COORDINATOR_ADDRESS = flags.DEFINE_string(
  "coordinator_address",
  None,
  "Address of process 0, as in --coordinator_address=10.0.0.1:8476. By default"
  " JAX_COORDINATOR_ADDRESS, or on a TPU pod its metadata.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes",
  None,
  "Number of processes, as in --num_processes=4. By default JAX_NUM_PROCESSES.",
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id",
  None,
  "Index of this process, as in --process_id=0. By default JAX_PROCESS_ID.",
)
_OF_ANSWER = (QUESTION, IMAGES, TEMPERATURE, SAMPLES)
ALL = (
  *(CONFIG, WORKDIR, *_OF_ANSWER, TOPOLOGY, ADVISE),
  *(_COORDINATOR_ADDRESS, _NUM_PROCESSES, _PROCESS_ID),
)


def workdir() -> str:
  """The folder of the run, without `~`; "" if --mode=answer has none."""
  if WORKDIR.value is None:
    return ""
  return str(paths.to_path("--workdir", WORKDIR.value))


def has_override(setting: str) -> bool:
  """True if the command line sets this setting, as in "model.weights"."""
  flag = flags.FLAGS[CONFIG.name]
  return setting in config_flags.get_override_values(flag)


def process_address() -> "initialize.ProcessAddress | None":
  """The address of this process, from flags or the environment."""
  from grpo_tpu.distributed import initialize

  address = initialize.read_process_address(
    _COORDINATOR_ADDRESS.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  )
  count = address.num_processes if address else 1
  holds = count == 1 or MODE.value != "answer"
  rule = "be 1 with --mode=answer, which runs on one process"
  validation.require(holds, "--num_processes", count, rule, "leave it out")
  return address


def parse(argv: Sequence[str]) -> list[str]:
  """Reads all flags, of the program's name and arguments; returns the name.

  Raises:
    ValueError: A flag or a setting is wrong; the message says how.
  """
  flags.mark_flag_as_required("config")
  try:
    words, unset = _read_overrides(argv)
    arguments = flags.FLAGS(words)
    # A missing config file raises when its values are first read.
    CONFIG.value.items()
    for name in unset:
      CONFIG.value.update_from_flattened_dict({name: None})
  except Exception as error:  # Config files may raise anything.
    # Without this, absl complains that it is too early to log.
    flags.FLAGS.mark_as_parsed()
    raise ValueError(_explain(error, argv)) from error
  for word in arguments[1:]:
    mode = f"did you mean --mode={word}?"
    question = mode if word in MODES else "write --name=value"
    raise ValueError(f"{word!r} is not a flag; {question}")
  _check_mode()
  return arguments


def _check_mode() -> None:
  """Refuses flags of another mode, and a missing --workdir."""
  mode = MODE.value
  is_answer = mode == "answer"
  has_workdir, rule = WORKDIR.value is not None, "name the folder of the run"
  validation.require(is_answer or has_workdir, "--workdir", "", rule, "")
  for flag in _OF_ANSWER:
    holds = is_answer or not flag.present
    rule = f"go with --mode=answer, and not with --mode={mode}"
    validation.require(holds, f"--{flag.name}", flag.value, rule, "")


def _read_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """Checks the names of the settings that flags change.

  Returns the arguments for absl, without a `~` before the config file, and the
  settings that become None, for which it has no word.
  """
  default = defaults.get_config().to_dict()
  words, unset = [], dict[str, None]()
  for word in argv:
    name, equals, value = word.partition("=")
    if equals and name in ("--config", "-config"):
      path, colon, kind = value.partition(":")
      with validation.user_errors():
        # On a disk; `epath` would take a device for a file.
        path = pathlib.Path(paths.to_path("--config", path))
        is_file = path.is_file() or not path.exists()
        validation.require(is_file, "--config", str(path), "name a file", "")
      word = f"{name}={path}{colon}{kind}"
    elif match := re.fullmatch(r"--?config\.(.+)", name):
      setting, held = match[1], _find_default(match[1], default, word)
      unset.pop(setting, None)
      if held is None and value == "None":
        unset[setting] = None
        continue
    words.append(word)
  return words, list(unset)


def _find_default(setting: str, values: Mapping[str, Any], word: str) -> Any:
  """The default of a setting, or the settings of a section."""
  value, prefix = values, ""
  for part in setting.split("."):
    names = list(value) if isinstance(value, Mapping) else []
    if part not in names:
      unknown = describe_unknown(prefix, part, names)
      raise validation.SettingError(f"{validation.printable(word)}: {unknown}")
    value, prefix = value[part], f"{prefix}{part}."
  return value


def _explain(error: Exception, argv: Sequence[str]) -> str:
  """The whole error in one line; the libraries give only a part."""
  if isinstance(error, validation.SettingError):
    return str(error)
  if isinstance(error, OSError):
    reason = str(error).splitlines()[-1].strip()
    return f"--config must name a file, such as configs/smoke.py: {reason}."
  if isinstance(error, flags.UnrecognizedFlagError):
    section, _, name = error.flagname.partition(".")
    if name and section in defaults.get_config():
      flag = f"--{error.flagname}"
      return f"{flag} is not a flag; did you mean --config.{error.flagname}?"
  if isinstance(error, flags.Error):
    # The error of a config file comes with its trace; the last line is enough.
    flag, _, trace = str(error).partition("Error whilst parsing config file")
    return flag + "".join(trace.splitlines()[-1:])
  cause = error.args[0] if error.args else error
  reason = " ".join(str(getattr(cause, "args", [cause])[0]).split())
  overrides = " ".join(x for x in argv if x.startswith("--config."))
  return f"{overrides}: not all of these are settings: {reason}"
