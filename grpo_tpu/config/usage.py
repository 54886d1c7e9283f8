"""The command line: --help, which is also docs/settings.md, and the flags."""

import dataclasses
import inspect
import re
import sys
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags

from data_pipelines.validation import (
  ExitCode,
  SettingError,
  describe_bounds,
  user_errors,
)
from grpo_tpu.config import defaults, flags, schema
from grpo_tpu.distributed import logs
from grpo_tpu.rl.settings import ObjectiveConfig, ObjectiveSettings

_HEAD = """\
# Flags and settings

`grpo_tpu --help` prints this page. A run is one command:

```
grpo_tpu --config=FILE --workdir=DIR [--mode=MODE] [--config.SETTING=VALUE ...]
```

`python -m grpo_tpu` is the same program. `--helpfull` lists the flags of all
libraries too. Exit codes: 0 done, 64 a wrong setting, flag or data set, 75
preempted or Ctrl-C, and saved (run the same command again), 76 no progress,
130 Ctrl-C and nothing saved, 1 any other error.
"""


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Prints the page for --help or no arguments; else reads the flags."""
  if len(argv) == 1 or {"--help", "-help", "-h"} & set(argv):
    sys.stdout.write(text())
    sys.exit(ExitCode.DONE)
  logs.set_up()
  try:
    with user_errors():
      return flags.parse(argv)
  except SettingError as error:
    from grpo_tpu.observability import exit_report

    exit_report.ExitReport().exit_with(error)


def text() -> str:
  """The whole page."""
  parts = [_HEAD, "## Modes\n"]
  parts += [_item(f"--mode={mode}", x) for mode, x in flags.MODES.items()]
  parts += ["\n## Flags\n"]
  for holder in flags.ALL:
    flag = absl_flags.FLAGS[holder.name]
    parts.append(_item(f"--{flag.name}", flag.help))
  parts += [
    "\n## Settings\n",
    "Each setting with its default. A config file or a flag changes it. `None`"
    " stands\nfor no value.",
  ]
  parts += _section(schema.Config, defaults.get_config().to_dict())
  return "\n".join(parts) + "\n"


def _section(
  cls: type, values: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
  """The items of a section, then the sections within it."""
  # The settings of the objective change a preset, whose class documents them.
  documented = ObjectiveConfig if cls is ObjectiveSettings else cls
  meanings, allowed = _meanings(cls) | _meanings(documented), dict[str, str]()
  for each in (*dataclasses.fields(documented), *dataclasses.fields(cls)):
    if choices := each.metadata.get("choices"):
      allowed[each.name] = f", choices {', '.join(choices)}"
    elif bounds := each.metadata.get("bounds"):
      allowed[each.name] = f", {describe_bounds(bounds)}"
  hints = typing.get_type_hints(cls)
  inner = [name for name in hints if dataclasses.is_dataclass(hints[name])]
  if prefix:
    summary = (cls.__doc__ or "").splitlines()[0]
    yield f"\n### {prefix.rstrip('.')}\n\n{summary}"
  yield ""
  for name in hints:
    if name not in inner:
      default = f"default {values[name]!r}{allowed.get(name, '')}"
      yield _item(f"{prefix}{name}", f"({default}) {meanings[name]}")
  for name in inner:
    yield from _section(hints[name], values[name], f"{prefix}{name}.")


def _meanings(cls: type) -> dict[str, str]:
  """The text for each attribute, from the docstring of a dataclass."""
  body = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]
  items = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", body, re.MULTILINE)
  return {name: " ".join(meaning.split()) for name, meaning in items}


def _item(name: str, meaning: str) -> str:
  """One item of a list, which reads well in Markdown and in a terminal."""
  return textwrap.fill(
    f"- `{name}`: {meaning}",
    width=80,
    subsequent_indent="  ",
    break_long_words=False,
    break_on_hyphens=False,
  )
