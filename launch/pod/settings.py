"""The settings file of `launch/tpu.sh`: NAME=VALUE lines, never executed.

A value is the text after the equals sign: no quotes, no variables, no commands.
The file must name every setting.
"""

import dataclasses
import difflib
import pathlib
import re
import tomllib
from typing import Any

from data_pipelines import validation

RULES: dict[str, dict[str, Any]] = tomllib.loads(
  pathlib.Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
)

# The label of every slice that the scripts make. Only these are deleted.
LABEL = "grpo-tpu"


@dataclasses.dataclass(frozen=True)
class Settings:
  """The values of the file; `launch/tpu.env.example` explains each.

  Raises:
    ValueError: A value breaks its rule in `settings.toml`.
  """

  project: str
  zone: str
  name: str
  accelerator_type: str
  runtime_version: str
  capacity: str
  request: str
  valid_for: str
  network: str
  subnetwork: str
  ssh: str
  service_account: str
  labels: str
  workdir: str
  image: str
  max_restarts: str
  grace_seconds: str
  kubernetes_namespace: str
  kubernetes_service_account: str

  def __post_init__(self):
    for name, rule in RULES.items():
      value = getattr(self, name.lower())
      is_valid = re.fullmatch(rule["pattern"], value, re.ASCII) is not None
      is_quoted = value[:1] in ("'", '"') and value[:1] == value[-1:]
      validation.require(
        is_valid or (value == "" and rule.get("optional", False)),
        name,
        value,
        f"be {rule['rule']}",
        rule["remedy"] + " without quotes" * is_quoted,
      )
    validation.require(
      validation.printable(self.workdir) == self.workdir,
      "WORKDIR",
      self.workdir,
      "have no control characters",
      "write it again, or choose another path",
    )
    validation.require(
      not self.image or ":" not in self.workdir.removeprefix("gs://"),
      "WORKDIR",
      self.workdir,
      "have no colon if IMAGE is set, because no container can mount it",
      "choose another path",
    )

  @property
  def all_labels(self) -> str:
    """The user's labels and ours, separated by commas as gcloud expects."""
    return f"{LABEL}={self.name}" + (self.labels and f",{self.labels}")

  @property
  def bucket(self) -> str | None:
    """The bucket of the workdir; None if the workdir is a path."""
    match = re.fullmatch(RULES["WORKDIR"]["pattern"], self.workdir)
    return match["bucket"] if match else None

  @property
  def path_in_bucket(self) -> str:
    """The path of the workdir inside its bucket."""
    return self.workdir.removeprefix(f"gs://{self.bucket}/")


def parse(text: str) -> Settings:
  """Parses the text of a settings file.

  Raises:
    ValueError: The message says what is wrong, the rule and the remedy.
  """
  values: dict[str, str] = {}
  for number, line in enumerate(map(str.strip, text.split("\n")), 1):
    if not line or line.startswith("#"):
      continue
    name, equals, value = line.partition("=")
    name = name.strip()
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
    if name in values:
      raise ValueError(
        f"{name} must be set once, but line {number} sets it again; remove one"
        " of the lines."
      )
    values[name] = value.strip()
  for name, rule in RULES.items():
    if name not in values:
      empty = " (it may be empty)" if rule.get("optional") else ""
      raise ValueError(f"{name} must be in the file{empty}; {rule['remedy']}.")
  return Settings(**{name.lower(): value for name, value in values.items()})


def read(path: pathlib.Path) -> Settings:
  """Reads a settings file.

  Raises:
    ValueError: The message names the file, what is wrong and the remedy.
  """
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeError) as error:
    raise ValueError(
      f"The settings file {path} must exist and be UTF-8 ({error}); copy"
      " launch/tpu.env.example to it and fill it in, or name another file with"
      " --settings=FILE."
    ) from error
  try:
    return parse(text)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
