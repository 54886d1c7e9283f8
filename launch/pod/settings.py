"""The settings file of `launch/tpu.sh`: NAME=VALUE lines, read and never run.

A value is what stands after the equals sign, as it stands: there are no quotes,
no variables and no commands in it. Every setting is in the file; one that may
be empty is written so.
"""

import configparser
import dataclasses
import difflib
import pathlib
import re

_LABEL = r"[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{0,63}"
_NAME = r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"
_PART = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
_SECTION = "settings"


@dataclasses.dataclass(frozen=True)
class Rule:
  """What a setting may be.

  Attributes:
    pattern: Of the whole value.
    words: The same for a reader: "must be ...".
    remedy: What to write instead.
    may_be_empty: Whether an empty value has a meaning.
  """

  pattern: str
  words: str
  remedy: str
  may_be_empty: bool = False


_OBJECT = r"(?:(?!\.{1,2}(?:/|$))[^/\x00-\x1f\x7f]+)"
_WORKDIR = (
  r"(?:gs://(?P<bucket>[a-z0-9][a-z0-9._-]{1,61}[a-z0-9])(?P<path>/"
  rf"{_OBJECT}(?:/{_OBJECT})*)|/{_OBJECT}(?:/{_OBJECT})*)"
)

RULES = {
  "PROJECT": Rule(
    r"(?:[a-z0-9.-]+:)?[a-z][a-z0-9-]{4,28}[a-z0-9]",
    "a project id: 6 to 30 lowercase letters, digits and hyphens, a letter"
    " first, no hyphen last",
    "write the id that `gcloud projects list` shows",
  ),
  "ZONE": Rule(
    r"[a-z]+-[a-z]+[0-9]{1,2}-[a-z0-9]{1,8}",
    "a zone, as in europe-west4-b",
    "write one that `gcloud compute tpus locations list` shows",
  ),
  "NAME": Rule(
    r"[a-z](?:[a-z0-9-]{0,38}[a-z0-9])?",
    "1 to 40 lowercase letters, digits and hyphens, a letter first, no hyphen"
    " last",
    "write a name such as grpo-1",
  ),
  "ACCELERATOR_TYPE": Rule(
    r"(?:v[2-9][a-z]{0,8}|tpu[0-9][a-z]?)-[1-9][0-9]{0,4}",
    "a type and a size, as in v5litepod-16",
    "write one that `gcloud compute tpus accelerator-types list` shows",
  ),
  "RUNTIME_VERSION": Rule(
    r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?",
    "the name of a runtime, as in v2-alpha-tpuv5-lite",
    "write one that `gcloud compute tpus tpu-vm versions list` shows",
  ),
  "CAPACITY": Rule(
    "spot|on-demand|reserved",
    "spot, on-demand or reserved",
    "write one of the three",
  ),
  "REQUEST": Rule("queued|direct", "queued or direct", "write one of the two"),
  "VALID_FOR": Rule(
    r"[1-9][0-9]{0,5}[smhd]",
    "how long to wait in the queue: a number and s, m, h or d",
    "write, say, 6h",
  ),
  "NETWORK": Rule(
    rf"(?:projects/[a-z0-9.:-]+/global/networks/)?{_NAME}",
    "the name of a network",
    "write default, or one that `gcloud compute networks list` shows",
  ),
  "SUBNETWORK": Rule(
    rf"(?:projects/[a-z0-9.:-]+/regions/[a-z0-9-]+/subnetworks/)?{_NAME}",
    "the name of a subnetwork, or empty",
    "leave it empty, or write one that `gcloud compute networks subnets list`"
    " shows",
    may_be_empty=True,
  ),
  "SSH": Rule(
    "external|internal|iap",
    "external, internal or iap",
    "write external, or one of the others for machines without outside"
    " addresses",
  ),
  "SERVICE_ACCOUNT": Rule(
    r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?@[a-z0-9.-]+\.gserviceaccount\.com",
    "the address of a service account, or empty",
    "leave it empty for the project's own, or write NAME@PROJECT"
    ".iam.gserviceaccount.com",
    may_be_empty=True,
  ),
  "LABELS": Rule(
    rf"{_LABEL}(?:,{_LABEL})*",
    "labels, name=value with commas between: lowercase letters, digits, _ and"
    " -, a letter first",
    "leave it empty, or write, say, team=vision,cost-centre=7",
    may_be_empty=True,
  ),
  "WORKDIR": Rule(
    _WORKDIR,
    "gs://BUCKET/PATH or an absolute path that all workers see, without . or"
    " .. in it and without a slash at the end",
    "write, say, gs://my-bucket/runs/first",
  ),
  "IMAGE": Rule(
    rf"(?:{_PART}(?::[0-9]+)?/)?{_PART}(?:/{_PART})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?",
    "the name of an image, or empty",
    "leave it empty to run the committed files, or write, say,"
    " europe-docker.pkg.dev/PROJECT/REPOSITORY/grpo_tpu:1",
    may_be_empty=True,
  ),
  "MAX_RESTARTS": Rule(
    r"0|[1-9][0-9]{0,3}", "a whole number below 10000", "write, say, 10"
  ),
  "GRACE_SECONDS": Rule(
    r"[1-9][0-9]{0,4}",
    "seconds for a run to save in, a whole number from 1",
    "write, say, 300",
  ),
  "KUBERNETES_NAMESPACE": Rule(
    r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?",
    "the name of a namespace",
    "write default, or one that `kubectl get namespaces` shows",
  ),
  "KUBERNETES_SERVICE_ACCOUNT": Rule(
    r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?",
    "the name of a Kubernetes service account",
    "write default, or one that may read and write the bucket",
  ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the settings file says; `launch/tpu.env.example` explains each.

  Raises:
    ValueError: A value is not what its rule says.
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
    for field in dataclasses.fields(self):
      name, value = field.name.upper(), getattr(self, field.name)
      rule = RULES[name]
      if value == "" and rule.may_be_empty:
        continue
      if not re.fullmatch(rule.pattern, value, re.ASCII):
        quoted = value[:1] in ("'", '"') and value[:1] == value[-1:]
        quotes = " without quotes" if quoted else ""
        raise ValueError(
          f"{name} ({value!r}) must be {rule.words}; {rule.remedy}{quotes}."
        )
    if OUR_LABEL in dict(label.split("=") for label in self._user_labels()):
      raise ValueError(
        f"LABELS ({self.labels!r}) must not have {OUR_LABEL}, which says that"
        " a slice was made here; take it out."
      )
    if "goog" in (self.bucket or "")[:4] or "google" in (self.bucket or ""):
      raise ValueError(
        f"WORKDIR ({self.workdir!r}) must be in a bucket whose name neither"
        " begins with goog nor holds google; write the name of yours."
      )

  def _user_labels(self) -> list[str]:
    return self.labels.split(",") if self.labels else []

  @property
  def all_labels(self) -> str:
    """As gcloud takes them: the user's, and the one that says whose it is."""
    return ",".join([f"{OUR_LABEL}={self.name}", *self._user_labels()])

  @property
  def bucket(self) -> str | None:
    """Of the workdir; None if it is a path."""
    found = re.fullmatch(_WORKDIR, self.workdir, re.ASCII)
    return found["bucket"] if found else None

  @property
  def path_in_bucket(self) -> str:
    """Of the workdir, for one in a bucket."""
    return self.workdir.removeprefix(f"gs://{self.bucket}/")


# The label of every slice that the scripts make; none without is ever deleted.
OUR_LABEL = "grpo-tpu"


def parse(text: str) -> Settings:
  """Settings from the text of a file.

  Args:
    text: Lines of NAME=VALUE; those that are empty or begin with # say nothing.

  Raises:
    ValueError: Naming what is wrong, the rule and the remedy.
  """
  parser = configparser.RawConfigParser(
    delimiters=("=",), comment_prefixes=("#",), empty_lines_in_values=False
  )
  parser.optionxform = lambda optionstr: optionstr
  try:
    parser.read_string(f"[{_SECTION}]\n{text}")
  except configparser.DuplicateOptionError as error:
    raise ValueError(
      f"{error.option} must stand once; line {_line(error)} has it again: take"
      " one out."
    ) from error
  except configparser.Error as error:
    raise ValueError(
      f"line {_line(error)} must be NAME=VALUE, a comment that begins with #,"
      " or empty; mend it."
    ) from error
  if parser.sections() != [_SECTION]:
    raise ValueError(
      f"[{parser.sections()[-1]}] must not stand in the file, which has no"
      " sections; take it out."
    )
  given = dict(parser[_SECTION])
  for name in given:
    if name not in RULES:
      near = difflib.get_close_matches(name.upper(), RULES, n=1)
      hint = f"did you mean {near[0]}?" if near else "take it out."
      raise ValueError(
        f"{name!r} must be a setting of launch/tpu.env.example; {hint}"
      )
  for name in RULES:
    if name not in given:
      empty = " (it may be empty)" if RULES[name].may_be_empty else ""
      raise ValueError(
        f"{name} must be in the file{empty}; {RULES[name].remedy}."
      )
  return Settings(**{name.lower(): value for name, value in given.items()})


def _line(error: configparser.Error) -> int:
  """Where in the file an error is, whose section line it does not have."""
  if isinstance(error, configparser.ParsingError):
    return error.errors[0][0] - 1
  return (getattr(error, "lineno", None) or 1) - 1


def read(path: pathlib.Path) -> Settings:
  """Settings from a file.

  Raises:
    ValueError: Naming the file, what is wrong, the rule and the remedy.
  """
  try:
    text = path.read_text(encoding="utf-8-sig")
  except (OSError, UnicodeError) as error:
    raise ValueError(
      f"The settings file {path} must be there, in UTF-8 ({error}); copy"
      " launch/tpu.env.example to it and fill it in, or name another with"
      " --settings=FILE."
    ) from error
  try:
    return parse(text)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
