"""The settings file is never executed; a wrong value is named."""

import pathlib
import re

import hypothesis
import pytest
from hypothesis import strategies as st

from data_pipelines import validation
from launch.pod import settings
from tests.launch.pod import fake_cloud

ROOT = pathlib.Path(__file__).resolve().parents[3]
HOSTILE = (
  *("$(touch owned)", "`touch owned`", "a; touch owned", "a b", "'my-project'"),
  *('"my-project"', "--impersonate-service-account=x@y", "-x", "../x", ""),
  *("my-project\x00", "My-Project", "mÿ-project"),
)


def text(**changes: str) -> str:
  values = fake_cloud.SETTINGS | changes
  return "".join(f"{name}={value}\n" for name, value in values.items())


def refusal(text: str) -> str:
  with pytest.raises(ValueError) as raised:
    settings.parse(text)
  return str(raised.value)


def test_the_example_is_a_settings_file_with_every_setting():
  path = ROOT / "launch" / "tpu.env.example"
  assert settings.read(path).name == "grpo-1"
  lines = re.findall(r"^#? ?([A-Z_]+)=", path.read_text(), re.MULTILINE)
  assert set(lines) == set(settings.RULES)


def test_values_are_read_literally():
  found = settings.parse(text(LABELS="team=vision", WORKDIR="/mnt/a b/$(x)"))
  assert found.workdir == "/mnt/a b/$(x)"
  assert found.bucket is None
  assert found.all_labels == "grpo-tpu=grpo-1,team=vision"


def test_blanks_comments_and_windows_line_ends_are_ignored():
  lines = "# a comment\r\n\r\n" + text().replace("=", " = ").replace(
    "\n", "\r\n"
  )
  assert settings.parse(lines) == settings.parse(text())


@pytest.mark.parametrize(
  "name",
  [
    n for n, rule in settings.RULES.items() if n not in ("WORKDIR", "VALID_FOR")
  ],
)
@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_value_is_refused_by_name_with_the_rule(name, value):
  rule = settings.RULES[name]
  if value == "" and rule.get("optional"):
    return
  said = refusal(text(**{name: value}))
  shown = value[: value.find("=") + 1] + "..." if name == "ENV" else value
  assert said.startswith(f"{name} ({shown!r}) must be {rule['rule']}")
  assert rule["remedy"] in said


@pytest.mark.parametrize(
  "value",
  [
    *("", "runs/first", "/", "/a/../b", "/a/./b", "/a//b", "/a\x07b"),
    *("gs://", "gs://my-bucket", "gs://my-bucket/", "gs://my-bucket/a/"),
    *("gs://my-bucket/../other/a", "gs://My-Bucket/a", "gs://$(x)/a"),
    *("gs://goog-mine/a", "gs://not-google/a"),
  ],
)
def test_a_workdir_is_a_bucket_path_or_an_absolute_path(value):
  assert refusal(text(WORKDIR=value)).startswith(f"WORKDIR ({value!r}) must be")


@pytest.mark.parametrize("character", "\x85\u2028\u202e")
def test_a_workdir_holds_nothing_that_a_terminal_obeys(character):
  said = refusal(text(WORKDIR=f"/mnt/a{character}exit_code=0"))
  assert said.startswith("WORKDIR ('/mnt/a\\") and said.isprintable()


@pytest.mark.parametrize("path", ["runs/first", "it's a $(run)"])
def test_a_bucket_may_hold_names_of_any_kind(path):
  found = settings.parse(text(WORKDIR=f"gs://my-bucket/{path}"))
  assert found.bucket == "my-bucket"


@pytest.mark.parametrize(
  "line, words",
  [
    ("ZONES=x\n", "'ZONES' must be a setting of launch/tpu.env.example; did"
     " you mean ZONE?"),
    ("zone=x\n", "did you mean ZONE?"),
    ("ZONE=x\n", "ZONE must be set once, but line 27 sets it again"),
    ("export\n", "Line 27 ('export') must be NAME=VALUE"),
    ("[tpu]\n", "Line 27 ('[tpu]') must be NAME=VALUE"),
  ],
)  # fmt: skip
def test_a_line_that_is_no_setting_is_named(line, words):
  assert words in refusal(text() + line)


@pytest.mark.parametrize("name", settings.RULES)
def test_a_missing_setting_is_named(name):
  lines = text().splitlines(keepends=True)
  rest = "".join(x for x in lines if not x.startswith(f"{name}="))
  if "absent" in settings.RULES[name]:
    # Files from before the setting existed keep their meaning.
    assert settings.parse(rest) == settings.parse(text())
  else:
    assert refusal(rest).startswith(f"{name} must be in the file")


def test_a_value_has_one_line():
  assert "('--other')" in refusal(text(NETWORK="default\n  --other"))


def test_our_own_label_cannot_be_set():
  assert "LABELS" in refusal(text(LABELS="grpo-tpu=other"))


@pytest.mark.parametrize("labels", ["a=-", "a=b-", "a-=1", "a_=1", "a=1,b=_"])
def test_a_label_that_kubernetes_refuses_is_refused(labels):
  assert "LABELS" in refusal(text(LABELS=labels))
  assert settings.parse(text(LABELS="a-b=c_d,e=")).labels == "a-b=c_d,e="


def test_an_image_mounts_a_shared_path_which_can_have_no_colon():
  settings.parse(text(WORKDIR="/mnt/a:b"))
  settings.parse(text(WORKDIR="gs://my-bucket/a:b", IMAGE="an-image"))
  assert "colon" in refusal(text(WORKDIR="/mnt/a:b", IMAGE="an-image"))


def test_zones_are_tried_in_their_order():
  assert settings.parse(text(ZONE="us-east5-b,europe-west4-a")).zones == [
    *("us-east5-b", "europe-west4-a"),
  ]
  for zones in ("us-east5-b,", "us-east5-b;us-east5-a", "us-east5-b,x"):
    assert refusal(text(ZONE=zones)).startswith("ZONE (")


def test_each_line_of_the_environment_is_a_variable():
  lines = "ENV=A=b=c \nENV = http_proxy=http://x:1\nENV=\nENV=A=last\n"
  found = settings.parse(text() + lines)
  assert found.environment == {"A": "last", "http_proxy": "http://x:1"}
  assert settings.parse(text()).environment == {}


@pytest.mark.parametrize(
  "line",
  ["UID=secret", "A B=secret", "1A=secret", "=secret", "secret", "A=secret\0",
   "A=secret\u202e", "export A=secret", "HF_TOKEN = secret"],
)  # fmt: skip
def test_no_value_of_the_environment_is_ever_printed(line):
  said = refusal(text() + f"ENV={line}\n")
  assert said.startswith("ENV (") and "secret" not in said


@pytest.mark.parametrize(
  "changes, name",
  [
    ({"NUM_SLICES": "2", "REQUEST": "direct"}, "REQUEST"),
    ({"CAPACITY": "flex-start"}, "MAX_RUN_DURATION"),
    ({"MAX_RUN_DURATION": "2d"}, "MAX_RUN_DURATION"),
    ({"RESERVATION": "mine"}, "RESERVATION"),
    ({"NUM_SLICES": "0"}, "NUM_SLICES"),
    ({"NUM_SLICES": "257"}, "NUM_SLICES"),
    (
      {"CAPACITY": "flex-start", "MAX_RUN_DURATION": "2d", "REQUEST": "direct"},
      "REQUEST",
    ),
  ],
)
def test_settings_that_exclude_each_other_are_refused(changes, name):
  assert refusal(text(**changes)).startswith(f"{name} (")


def test_several_slices_have_numbered_names():
  assert settings.parse(text(NUM_SLICES="3")).nodes == [
    *("grpo-1-0", "grpo-1-1", "grpo-1-2"),
  ]


def test_a_section_is_no_line_of_the_file():
  assert "Line 1 ('[DEFAULT]')" in refusal("[DEFAULT]\n" + text())


LINES = st.lists(
  st.builds(
    "{}{}{}".format,
    st.sampled_from([*fake_cloud.SETTINGS, "#", "[x]", ""]) | st.text(),
    st.sampled_from(["=", " = ", "==", ""]),
    st.sampled_from([*fake_cloud.SETTINGS.values(), *HOSTILE]) | st.text(),
  )
)


@hypothesis.given(LINES)
def test_any_file_is_read_or_refused_in_words(lines):
  try:
    settings.parse(text() + "\n".join(lines))
  except ValueError as error:
    assert str(error)


@hypothesis.given(
  name=st.sampled_from(sorted(fake_cloud.SETTINGS)), value=st.text()
)
def test_any_value_that_is_taken_is_printed_as_it_is(name, value):
  try:
    found = settings.parse(text(**{name: value}))
  except ValueError:
    return
  taken = getattr(found, name.lower())
  assert validation.printable(taken) == taken


@pytest.mark.parametrize("name", ["missing.env", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
  with pytest.raises(ValueError, match=r"launch/tpu\.env\.example") as raised:
    settings.read(tmp_path / name)
  assert str(tmp_path / name) in str(raised.value)
