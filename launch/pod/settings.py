"""The settings file of `launch/tpu.sh`: NAME=VALUE lines, never executed.

A value is the text after the equals sign: no quotes, no variables, no commands.
The file must name every setting that has no `absent` value in `settings.toml`.
"""

import difflib
import pathlib
import re
import tomllib
import types
from typing import Any

from data_pipelines import validation

RULES: dict[str, dict[str, Any]] = tomllib.loads(
  pathlib.Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)

# The label of every slice that the scripts make. Only these are deleted.
LABEL = "grpo-tpu"


class Settings(types.SimpleNamespace):
  """The values, by names in lower case; a ValueError names a wrong one."""

  def __init__(self, **values: str):
    super().__init__(**values)
    for name, rule in RULES.items():
      value = getattr(self, name.lower())
      parts = value.split(rule["separator"]) if "separator" in rule else [value]
      for part in parts:
        is_valid = re.fullmatch(rule["pattern"], part, re.ASCII) is not None
        is_valid = is_valid and validation.printable(part) == part
        is_valid = is_valid or (part == "" and rule.get("optional", False))
        if rule.get("is_secret"):
          part = part and part[: part.find("=") + 1] + "..."
        words = (f"be {rule['rule']}", rule["remedy"])
        validation.require(is_valid, name, part, *words)
      for extra in rule.get("with", ()):
        other = getattr(self, extra["other"].lower())
        holds = bool(re.fullmatch(extra["pattern"], value))
        holds = holds or not re.fullmatch(extra["matches"], other)
        words = (f"be {extra['rule']}", extra["remedy"])
        validation.require(holds, name, value, *words)

  @property
  def zones(self) -> list[str]:
    """The zones in the order in which they are tried."""
    return self.zone.split(",")

  @property
  def nodes(self) -> list[str]:
    """The names of the TPU VMs: one for each slice."""
    several = [f"{self.name}-{k}" for k in range(int(self.num_slices))]
    return several if len(several) > 1 else [self.name]

  @property
  def environment(self) -> dict[str, str]:
    """The environment variables of the run."""
    return dict(x.split("=", 1) for x in self.env.split("\n") if x)

  @property
  def all_labels(self) -> str:
    """The user's labels and ours, separated by commas as gcloud expects."""
    return f"{LABEL}={self.name}" + (self.labels and f",{self.labels}")

  @property
  def bucket(self) -> str | None:
    """The bucket of the workdir; None if the workdir is a path."""
    is_bucket = self.workdir.startswith("gs://")
    return self.workdir.split("/")[2] if is_bucket else None


def parse(text: str) -> Settings:
  """Parses a settings file; a ValueError has the line, rule and remedy."""
  values = {x: rule["absent"] for x, rule in RULES.items() if "absent" in rule}
  named = set()
  for number, line in enumerate(map(str.strip, text.split("\n")), 1):
    if not line or line.startswith("#"):
      continue
    name, equals, value = map(str.strip, line.partition("="))
    if not equals:
      raise ValueError(
        f"Line {number} ({line!r}) must be NAME=VALUE, a comment starting with"
        " #, or empty; correct or remove it."
      )
    if name not in RULES:
      near = difflib.get_close_matches(name.upper(), RULES, n=1)
      hint = f"did you mean {near[0]}?" if near else "remove the line."
      raise ValueError(
        f"{name!r} must be a setting of launch/tpu.env.example; {hint}"
      )
    if name in named and RULES[name].get("separator") != "\n":
      raise ValueError(
        f"{name} must be set once, but line {number} sets it again; remove one"
        " of the lines."
      )
    values[name] = f"{values[name]}\n{value}" if name in named else value
    named.add(name)
  for name, rule in RULES.items():
    if name not in values:
      empty = " (it may be empty)" if rule.get("optional") else ""
      raise ValueError(f"{name} must be in the file{empty}; {rule['remedy']}.")
  return Settings(**{name.lower(): value for name, value in values.items()})


def read(path: pathlib.Path) -> Settings:
  """Reads a settings file; a ValueError names it and what is wrong."""
  try:
    return parse(path.read_text(encoding="utf-8-sig"))
  except (OSError, UnicodeError) as error:
    raise ValueError(
      f"The settings file {path} must exist and be UTF-8 ({error}); copy"
      " launch/tpu.env.example to it and fill it in, or name another file with"
      " --settings=FILE."
    ) from error
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
