"""Jinja files write the user's turn, or are refused by file and line."""

import pickle
import time

import pytest

from data_pipelines import records
from data_pipelines.text import chat_prompts, template_files

CHOICES = records.Problem(
  pid="7",
  question="Which is taller?",
  images=(b"1", b"2"),
  choices=("the oak", "the elm"),
  answer="the elm",
  unit="m",
  question_type="multi_choice",
  answer_type="text",
  query="Which is taller? (Unit: m)\n(A) the oak\n(B) the elm",
  metadata={"level": 3, "topic": "trees"},
)
MARKED = records.Problem(
  pid="8",
  question="Is <image> left of <image>?",
  images=(b"1", b"2"),
  answer="3",
  question_type="free_form",
  answer_type="integer",
  query="Is <image> left of <image>?",
)


def opened(tmp_path, source):
  path = tmp_path / "mine.jinja"
  path.write_bytes(source if isinstance(source, bytes) else source.encode())
  return chat_prompts.open_template(str(path))


def tried(tmp_path, source, *problems):
  """The template, after what a run does to it before it starts."""
  template = opened(tmp_path, source)
  problems = problems or (CHOICES,)
  template.file.try_out([chat_prompts.variables(p, template) for p in problems])
  return template


@pytest.mark.parametrize(
  "source, text",
  [
    ("{{ query }}\nThink!\n", CHOICES.query + "\nThink!"),
    (
      "{# A comment. #}\n{{ images }}\n{{ question }}\n"
      "  {% for option in choices %}\n"
      "- {{ option.letter }}: {{ option.text }}\n"
      "  {% endfor %}\n"
      "{% if unit %}In {{ unit }}.{% endif %} {{ num_images }} pictures.",
      "<image><image>\nWhich is taller?\n- A: the oak\n- B: the elm\n"
      "In m. 2 pictures.",
    ),
    (
      "Left {{ image }} right <image>: {{ question | upper }} "
      "{{ metadata.topic }}, {{ metadata['level'] + 1 }}, {{ answer_type }}",
      "Left <image> right <image>: WHICH IS TALLER? trees, 4, text",
    ),
  ],
)
def test_a_file_writes_exactly_this(tmp_path, source, text):
  template = tried(tmp_path, source)
  assert chat_prompts.prompt_text(CHOICES, template=template) == text
  # Grain sends it to worker processes.
  sent = pickle.loads(pickle.dumps(template))
  assert chat_prompts.prompt_text(CHOICES, template=sent) == text


def test_pictures_stay_where_a_question_shows_them(tmp_path):
  template = tried(tmp_path, "{{ images }}{{ question }}", CHOICES, MARKED)
  text = chat_prompts.prompt_text(MARKED, template=template)
  assert text == "Is <image> left of <image>?"


@pytest.mark.parametrize(
  "source, completion",
  [
    ("{{ question }} Use <answer>.", "So. <answer>the elm</answer>"),
    ("{{ question }} In \\boxed{}.", "So. \\boxed{the elm}"),
    ("{{ question }} {# \\boxed #}", "So. \\boxed{the elm}"),
    (
      "{{ question }} <reasoning> and <answer>",
      "<reasoning>So.</reasoning> <answer>the elm</answer>",
    ),
    ("{{ question }}", "So. The answer is the elm."),
  ],
)
def test_completions_state_the_answer_as_the_file_asks(
  tmp_path, source, completion
):
  template = opened(tmp_path, source)
  written = chat_prompts.with_answer("So.", "the elm", template=template)
  assert written == completion


@pytest.mark.parametrize(
  "source, reason",
  [
    ("{{ question }}\n{{ question }", "line 2: unexpected '}'"),
    ("{{ question }}\n\n{% for x in y %}", "line 3: Unexpected end"),
    ("{{ question }}\n{{ answer }}", "line 2: 'answer' is undefined"),
    ("{{ question }}{{ solution }}", "line 1: 'solution' is undefined"),
    ("a\nb{{ metadata.none }}", "line 2: 'dict object' has no attribute"),
    ("{{ question }}\n{% include 'x' %}", "line 2: .* no loader"),
    ("{{ question.__class__ }}", "line 1: .* unsafe"),
    ("{{ metadata.update(a=1) }}", "line 1: .* unsafe"),
    ("{{ question }}\n{{ 1 / 0 }}", "line 2: ZeroDivisionError"),
    ("{{ question }}{{ [1, 2] | random }}", "line 1: No filter named 'random'"),
    ("{{ question }}{{ lipsum() }}", "line 1: 'lipsum' is undefined"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{{ question }}{{ 'x' * 10**12 }}", "MemoryError"),
    ("{{ question }}{{ 'x' * 10**6 }}", "more than 100000 characters"),
    ("Say it.", "leaves out the question"),
    ("", "writes no text"),
    ("{# {{ question }} #}\n", "writes no text"),
    ("<image>{{ question }}", "writes 1 image marks where there are 2"),
    ("\n<start_of_turn>user\n{{ question }}", "line 2 has <start_of_turn>"),
    (b"\xff\xfe\x00", "cannot be read: 'utf-8'"),
    ("{{ question }}\x1b[1m{{ x }}\x1b", "line 1: 'x' is undefined"),
  ],
)
def test_a_wrong_file_is_refused_by_file_and_line(tmp_path, source, reason):
  with pytest.raises(ValueError, match=reason) as caught:
    tried(tmp_path, source)
  message = str(caught.value)
  assert message.startswith(
    f"data.prompt_template ({str(tmp_path / 'mine.jinja')!r}) must be"
  )
  assert "; " in message and message.isprintable() and len(message) < 800


@pytest.mark.parametrize("name", ["none.jinja", "folder.jinja"])
def test_what_is_no_file_is_refused(tmp_path, name):
  (tmp_path / "folder.jinja").mkdir()
  with pytest.raises(ValueError, match="must be a jinja .* cannot be read"):
    chat_prompts.open_template(str(tmp_path / name))


def test_a_loop_without_end_is_ended(tmp_path, monkeypatch):
  monkeypatch.setattr(template_files, "_TIMEOUT_SECONDS", 1.0)
  loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
  start = time.monotonic()
  with pytest.raises(ValueError, match="longer than 1 seconds; bound its loop"):
    tried(tmp_path, "{{ question }}" + loop)
  assert time.monotonic() - start < 30


def test_a_row_that_the_file_cannot_write_is_a_bad_record(tmp_path):
  """The first problems had the column."""
  template = tried(tmp_path, "{{ question }}\n{{ metadata.topic }}")
  with pytest.raises(records.BadRecord, match="line 2: .*topic") as caught:
    chat_prompts.prompt_text(MARKED, template=template)
  assert caught.value.reason == "prompt_template"


def test_the_fingerprint_is_of_the_text_and_not_of_the_path(tmp_path):
  first = opened(tmp_path, "{{ question }}")
  (tmp_path / "else").mkdir()
  assert opened(tmp_path / "else", "{{ question }}") != first
  same = opened(tmp_path / "else", "{{ question }}").fingerprint
  assert same == first.fingerprint
  other = opened(tmp_path, "{{ question }} ").fingerprint
  known = [x.fingerprint for x in chat_prompts.TEMPLATES.values()]
  assert len({same, other, *known}) == 2 + len(known)
