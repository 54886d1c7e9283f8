"""Rules of settings: bounds, choices, and the words of their errors."""

import errno
import math
from dataclasses import dataclass, field

import pytest

from data_pipelines import validation
from data_pipelines.validation import at_least, interval, one_of


@dataclass(frozen=True)
class Section:
  share: float | None = field(default=0.5, metadata=interval("[0, 1)", 0.1))
  scale: float = field(default=1.0, metadata=interval("(0, inf)", 2.0))
  norm: float = field(default=1.0, metadata=interval("(0, inf]", 1.0))
  count: int = field(default=2, metadata=at_least(2))
  kind: str = field(default="near", metadata=one_of(["near", "far"]))
  names: tuple[str, ...] = field(default=(), metadata=one_of(["a", "b"]))

  def __post_init__(self):
    validation.check_fields(self, "part")


@pytest.mark.parametrize(
  "values",
  [
    {"share": 0.0},
    {"share": None},
    {"norm": math.inf},
    {"count": 10**9},
    {"names": ("b", "a")},
  ],
)
def test_a_value_within_its_bounds_is_accepted(values):
  Section(**values)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (
      {"share": 1.0},
      "share (1.0) must be at least 0 and below 1; set part.share=0.1.",
    ),
    ({"scale": 0}, "scale (0) must be above 0; set part.scale=2.0."),
    (
      {"scale": math.inf},
      "scale (inf) must be above 0 and finite; set part.scale=2.0.",
    ),
    ({"norm": math.nan}, "norm (nan) must be above 0; set part.norm=1.0."),
    ({"count": 1}, "count (1) must be at least 2; set part.count=2."),
    (
      {"kind": "fur"},
      "kind ('fur') must be one of near, far; did you mean far?",
    ),
    ({"kind": "x"}, "kind ('x') must be one of near, far."),
    (
      {"names": ("a", "a")},
      "names (('a', 'a')) must be names of a, b, each once; "
      "set part.names=('a', 'b').",
    ),
  ],
)
def test_an_error_says_setting_value_rule_and_remedy(values, message):
  with pytest.raises(ValueError) as caught:
    Section(**values)
  assert str(caught.value) == f"part.{message}"


def test_only_a_value_error_becomes_a_setting_error():
  with pytest.raises(validation.SettingError, match="seed"):
    with validation.user_errors():
      raise ValueError("seed")
  with pytest.raises(ZeroDivisionError):
    with validation.user_errors():
      _ = 1 / 0


def test_exit_codes_are_those_that_the_documents_promise():
  codes = {code.name: int(code) for code in validation.ExitCode}
  assert codes == {
    "DONE": 0,
    "FAILED": 1,
    "BAD_INPUT": 64,
    "PREEMPTED": 75,
    "STUCK": 76,
    "INTERRUPTED": 130,
  }


def failed_read(number):
  """An error that a reader raises for an I/O error."""
  try:
    raise OSError(number, "it failed")
  except OSError as error:
    raise ValueError("FILE cannot be read") from error


def test_a_file_that_is_missing_is_an_error_of_the_user():
  with pytest.raises(validation.SettingError), validation.user_errors():
    failed_read(errno.ENOENT)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_disk_that_fails_is_no_error_of_the_user(number):
  with pytest.raises(ValueError) as caught, validation.user_errors():
    failed_read(number)
  assert not isinstance(caught.value, validation.SettingError)


def test_what_a_library_cannot_do_is_no_error_of_the_user():
  with (
    pytest.raises(RuntimeError, match="cannot read FILE: NOT_FOUND"),
    validation.user_errors(),
    validation.run_errors("read FILE"),
  ):
    raise ValueError("NOT_FOUND: no such object")


def test_a_refusal_inside_such_an_action_stays_one():
  refusal = validation.SettingError("seed (-1) must be at least 0")
  with (
    pytest.raises(validation.SettingError) as caught,
    validation.run_errors("read FILE"),
  ):
    raise refusal
  assert caught.value is refusal
