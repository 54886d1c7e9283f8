"""Rows of any columns become problems, as their columns mean them."""

import dataclasses
import io
import json

import pytest
from PIL import Image

from data_pipelines import records, validation
from data_pipelines.sources import files
from data_pipelines.sources.drawn import synthetic
from data_pipelines.sources.rows import columns


def png(i: int) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (8, 8), (i, 2, 3)).save(file, "PNG")
  return file.getvalue()


def struct(i: int) -> dict:
  return {"bytes": png(i), "path": None}


FILES = {f"images/{i}.png": png(i) for i in range(4)}


def read_file(name: str) -> bytes:
  if name not in FILES:
    raise records.BadRecord("missing_image", f"No such file: {name}")
  return FILES[name]


def problems(rows, given=(), **settings):
  found = columns.choose(rows, dict(given))
  made = [
    columns.to_problem(
      files.Row(row, read_file), found, i, columns.Settings(**settings)
    )
    for i, row in enumerate(rows)
  ]
  for problem in made:
    records.validate(problem)
    assert records.from_example(records.to_example(problem)) == problem
  return made


def problem(given=(), settings=(), **row):
  (made,) = problems([row], given, **dict(settings))
  return made


def reject(given=(), **row):
  with pytest.raises(records.BadRecord) as error:
    problem(given, **row)
  assert "PNG" not in str(error.value) and len(str(error.value)) < 400
  return error.value


def test_a_row_without_ids_has_its_number_and_keeps_its_other_columns():
  row = {"problem": "2 + 2?", "label": 4, "level": 2, "tags": ["a", {"b": 1}]}
  made = problem(**row)
  assert made == records.Problem(
    pid="0",
    question="2 + 2?",
    query="2 + 2?",
    answer="4",
    answer_type="integer",
    question_type="free_form",
    metadata={"level": 2, "tags": ["a", {"b": 1}]},
  )


@pytest.mark.parametrize(
  "value",
  [
    struct(1),
    [struct(1)],
    png(1),
    "images/1.png",
    {"bytes": None, "path": "images/1.png"},
    {"url": "images/1.png"},
    "file:///somewhere/else/images/1.png",
    "D:\\else\\images\\1.png",
    "['images/1.png']",
    "data:image/png;base64,",
    "",
  ],
  ids=str,
)
def test_a_picture_is_read_however_it_is_held(value):
  import base64

  if isinstance(value, str) and value.endswith((",", "")) and "." not in value:
    value += base64.b64encode(png(1)).decode()
  assert problem(question="q", answer="1", image=value).images == (png(1),)


OPTIONS = ("12 cm", "5", "7 cm")


@pytest.mark.parametrize(
  "options",
  [
    OPTIONS,
    [f"{letter}. {x}" for letter, x in zip("ABC", OPTIONS, strict=True)],
    [f"({letter}) {x}" for letter, x in zip("ABC", OPTIONS, strict=True)],
    dict(zip("ABC", OPTIONS, strict=True)),
    json.dumps(OPTIONS),
    "['12 cm' '5' '7 cm']",
    json.dumps(dict(zip("CBA", OPTIONS[::-1], strict=True))),
    {"text": OPTIONS, "label": ["A", "B", "C"]},
    [{"label": "A", "text": x} for x in OPTIONS],
    "A. 12 cm; B. 5; C. 7 cm",
    "(A) 12 cm (B) 5 (C) 7 cm",
    "12 cm\n5\n7 cm",
  ],
  ids=str,
)
def test_options_are_the_same_however_they_are_held(options):
  if isinstance(options, dict):
    options = {
      k: list(v) if isinstance(v, tuple) else v for k, v in options.items()
    }
  options = list(options) if isinstance(options, tuple) else options
  made = problem(question="q", options=options, answer="5")
  assert made.choices == OPTIONS and made.answer == "5"
  assert made.query == "q\n(A) 12 cm\n(B) 5\n(C) 7 cm"


@pytest.mark.parametrize(
  "gold",
  [
    *("C", "c", "(C)", "C.", "C)", "7 cm", "C. 7 cm", "(C) 7 cm", "\\boxed{C}"),
    *("<answer>C</answer>", "The answer is C.", ["C"], "So it is C.\n#### C"),
  ],
  ids=str,
)
def test_an_option_is_named_by_letter_or_text(gold):
  assert (
    problem(question="q", choices=list(OPTIONS), answer=gold).answer == "7 cm"
  )
  asked = "q\nChoices:\nA. 12 cm\nB. 5\nC. 7 cm"
  if gold != "7 cm":
    made = problem(question=asked, answer=gold)
    assert (made.question, made.choices) == ("q", OPTIONS)
    assert (made.answer, made.question_type) == ("7 cm", "multi_choice")


@pytest.mark.parametrize(
  "asked",
  [
    *(
      "q\nA. 3\nB. 4\nC. 5",
      "q Choices: (A) 3 (B) 4 (C) 5",
      "q A: 3; B: 4; C: 5",
    ),
    *("q\nChoices:\nA:3\nB:4\nC:5", "q\uff08\uff09\nA\uff0e3B\uff0e4C\uff0e5"),
    "q\n**Options:**\nA) 3, B) 4, C) 5",
  ],
)
def test_options_in_the_question_are_taken_out_of_it(asked):
  made = problem(question=asked, answer="B")
  assert made.question.rstrip("\uff08\uff09") == "q"
  assert (made.choices, made.answer) == (("3", "4", "5"), "4")
  assert reject(question=asked, answer="D").reason == "answer_not_in_choices"
  assert problem(question=asked, answer="Bob").answer_type == "text"


def test_whole_numbers_count_the_options_where_they_are_no_options():
  rows = [
    {"question": "q", "choices": ["x", "y", "z"], "answer": i} for i in (0, 2)
  ]
  assert [each.answer for each in problems(rows)] == ["x", "z"]
  rows = [{**row, "answer": str(row["answer"] + 1)} for row in rows]
  assert [each.answer for each in problems(rows)] == ["x", "z"]
  counted = [{**row, "answer": i + 1} for i, row in enumerate(rows * 2)]
  counted[3]["answer"] = 3
  assert [x.answer for x in problems(counted)] == ["x", "y", "z", "z"]
  numbers = [{**row, "choices": ["1", "2.0", "3"]} for row in rows]
  assert [each.answer for each in problems(numbers)] == ["1", "3"]


@pytest.mark.parametrize("gold", ["D", "A, C", "9 cm", "A. 7 cm", 99, None])
def test_a_gold_that_is_no_option_is_rejected_unless_it_is_kept(gold):
  row = {"question": "q", "choices": list(OPTIONS), "answer": gold}
  error = reject(**row)
  reasons = ("answer_not_in_choices", "missing_answer")
  assert error.reason == reasons[gold is None] and "answer" in error.detail
  made = problem(settings={"unchecked_answers": "keep"}, **row)
  assert made.answer_type == "unchecked" and made.choices == OPTIONS
  assert not made.is_checkable and "(C) 7 cm" in made.query


@pytest.mark.parametrize(
  "mark",
  ["<image>", "<|image|>", "<img>", "<image 1>", "<image1>", "<image_1>"]
  + ["<|vision_start|><|image_pad|><|vision_end|>"],
)
def test_a_mark_of_any_format_stands_where_it_stood(mark):
  row = {"question": f"In {mark}, who?", "answer": "1"}
  assert problem(**row, image=struct(1)).question == "In <image>, who?"
  assert problem(**row, images=[struct(1)]).question == "In <image>, who?"
  error = reject(**row)
  assert error.reason == "missing_image" and "--columns=images=" in error.detail
  row["question"] = "In it, who? <start_of_turn>"
  assert problem(**row, image=struct(1)).question == row["question"]


def test_numbered_marks_say_which_picture_and_options_have_none():
  row = {f"image_{i + 1}": struct(i) for i in range(4)} | {"image_4": None}
  question = "Is <image 3> as <image 1>? Not <image 3>."
  options = "['<image 2>', 'neither']"
  made = problem(question=question, options=options, answer="A", **row)
  expected = "Is <image> as <image>? Not image 3.\nimage 2: <image>"
  assert made.question == expected
  assert made.images == (png(2), png(0), png(1))
  assert made.choices == ("image 2", "neither") and made.answer == "image 2"


def test_marks_may_be_numbered_from_0():
  row = {"images": [struct(0), struct(1)], "answer": "1"}
  made = problem(question="<image_1> or <image_0>?", **row)
  assert made.question == "<image> or <image>?"
  assert made.images == (png(1), png(0))


@pytest.mark.parametrize(
  "marks", ["<image>", "<image><image><image>", "<image 3>"]
)
def test_marks_and_pictures_of_other_numbers_are_rejected(marks):
  row = {"images": [struct(0), struct(1)], "answer": "1"}
  assert reject(question=f"{marks} q", **row).reason == "image_count"
  assert len(problem(question="q", **row).images) == 2


def turns(*texts, system=""):
  roles = ("user", "assistant") * len(texts)
  pairs = zip(roles, texts, strict=False)
  found = [{"role": role, "content": text} for role, text in pairs]
  return [{"role": "system", "content": system}] * bool(system) + found


def test_a_conversation_is_its_first_question_and_reply():
  made = problem(messages=turns("q1", "4", "q2", "5", system="Be kind."))
  assert (made.question, made.answer) == ("q1", "4")
  assert made.metadata == {"system": "Be kind."} and made.completions == ()
  found = columns.choose([{"messages": turns("q1", "4", "q2", "5")}], {})
  assert "several questions, of which the first counts" in found.described
  parts = [
    {"type": "text", "text": "What?"},
    {"type": "image", "image": png(2)},
  ]
  made = problem(messages=turns(parts, [{"type": "text", "text": "red"}]))
  assert (made.question, made.images) == ("What?\n<image>", (png(2),))


def test_a_prompt_that_ends_with_a_question_keeps_what_was_said_before():
  row = {"reward_model": {"ground_truth": ["5"], "style": "rule"}}
  made = problem(prompt=turns("q1", "4", "q2"), **row)
  assert made.question == "User: q1\nAssistant: 4\nUser: q2"
  assert made.answer == "5" and made.metadata == row


def test_a_long_reply_is_a_demonstration_and_a_gold_in_it_its_answer():
  made = problem(question="q", response="It shows a red bar and a blue bar.")
  assert (made.answer_type, made.answer) == ("unchecked", "")
  assert made.completions == ((made.completions[0].text, 1.0),)
  reply = "<think>We add 3 and 4.</think><answer>7</answer>"
  made = problem(messages=turns("q", reply))
  assert made.answer == "7" and made.completions == ((reply, 1.0),)
  made = problem(question="q", response="It is seven.", answer="7")
  assert made.answer == "7" and made.completions == (("It is seven.", 1.0),)


PAIR = (("good", 1.0), ("bad", 0.0))


@pytest.mark.parametrize(
  "row, expected",
  [
    ({"question": "q", "chosen": "good", "rejected": "bad"}, PAIR),
    (
      {"chosen": turns("q", "good"), "rejected": turns("q", "bad")},
      PAIR,
    ),
    (
      {"prompt": turns("q"), "chosen": turns("q", "good")[1:]}
      | {"rejected": turns("q", "bad")[1:]},
      PAIR,
    ),
    (
      {"chosen": "\n\nHuman: q\n\nAssistant: good"}
      | {"rejected": "\n\nHuman: q\n\nAssistant: bad"},
      PAIR,
    ),
    (
      {
        "prompt": "q",
        "chosen": turns("q", "good"),
        "rejected": turns("q", "bad"),
      }
      | {"messages": turns("q", "good")}
      | {"score_chosen": 8, "score_rejected": "2.5"},
      (("good", 8.0), ("bad", 2.5)),
    ),
  ],
)
def test_a_pair_of_replies_is_labelled_completions(row, expected):
  made = problem(**row, image=struct(1))
  assert made.question == "q" and made.images == (png(1),)
  assert made.completions == expected and made.answer_type == "unchecked"
  assert problem(**row, image=struct(1), answer="7").answer == "7"


def test_completions_with_labels_are_kept_and_their_labels_are_no_answers():
  given = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]
  assert problem(question="q", completions=given).completions == PAIR
  for good in (True, False):
    made = problem(prompt="q", completion="seven", label=good)
    assert made.completions == (("seven", float(good)),)
    assert (made.answer, made.answer_type) == ("", "unchecked")
  assert problem(prompt="q", completion="seven", label="7").answer == "7"
  assert problem(question="q", label=True).answer == "yes"
  for wrong in ([{"text": "good", "label": "best"}], [*given, "bad"]):
    found = reject(question="q", completions=wrong)
    assert found.reason == "bad_completions"


def test_columns_of_measures_go_before_what_the_gold_says():
  row = {"question": "q", "answer": "5.0", "unit": "kg", "precision": 2.0}
  made = problem(**row, aliases=["five"], tolerance=0.1)
  assert (made.unit, made.precision, made.tolerance) == ("kg", 2, 0.1)
  assert made.aliases == ("five",) and "(Unit: kg)" in made.query
  chart = {"query": "q", "label": ["4"], "human_or_machine": 0}
  assert problem(**chart).tolerance == 0.05
  assert problem(settings={"tolerance": 0.0}, **chart).tolerance == 0.0
  assert problem(settings={"tolerance": 0.2}, **row).tolerance == 0.2
  assert problem(**{**chart, "label": ["Yes"]}).tolerance == 0.0
  assert reject(**row, tolerance=3).reason == "bad_tolerance"


def test_the_solution_is_the_gold_only_where_there_is_no_answer():
  row = {"question": "q", "solution": "We add 3 and 4: \\boxed{7}."}
  made = problem(**row)
  assert (made.answer, made.solution) == ("7", row["solution"])
  made = problem(**row, answer="8")
  assert (made.answer, made.solution) == ("8", row["solution"])


def test_what_a_question_needs_stands_beside_it():
  made = problem(instruction="Add.", input="3 and 4", output="7")
  assert (made.question, made.answer) == ("Add.\n3 and 4", "7")
  made = problem(passage="Ann has 3.", question="How many?", answer=3)
  assert made.question == "Ann has 3.\nHow many?"
  made = problem(context="photo", question="How many?", answer=3)
  assert made.metadata == {"context": "photo"}


def test_given_columns_overrule_the_guess():
  row = {"question": "a", "problem": "b", "answer": "1", "x": {"y": "2"}}
  assert problem(**row).question == "a"
  assert (
    "question is question, not problem" in columns.choose([row], {}).described
  )
  made = problem(
    {"question": "problem", "answer": "x.y", "pid": ""}, **row, id=9
  )
  assert (made.pid, made.question, made.answer) == ("0", "b", "2")


@pytest.mark.parametrize(
  "given, named",
  [
    ({"answer": "final"}, "final is none of image, question"),
    ({"question": "question.text"}, "question.text is none of image, question"),
    ({"quest": "question"}, "quest is none of pid, question"),
  ],
)
def test_an_unknown_column_is_named_with_those_there_are(given, named):
  with pytest.raises(validation.SettingError, match=named):
    columns.choose([{"question": "q", "image": png(1)}], given)


def test_a_source_without_a_question_is_refused_with_its_columns():
  rows = [{"question": struct(1), "foo": "q", "answer": "1"}]
  with pytest.raises(validation.SettingError, match="answer, foo, question"):
    columns.choose(rows, {})


@pytest.mark.parametrize(
  "row, reason, words",
  [
    ({"question": "q"}, "missing_answer", "--columns=answer=NAME"),
    ({"question": "q", "answer": struct(1)}, "missing_answer", "of answer"),
    (
      {"question": "q", "answer": "1", "image": 7},
      "missing_image",
      "image holds 7",
    ),
    (
      {"question": "q", "answer": "1", "image": "no.png"},
      "missing_image",
      "no.png",
    ),
    ({"question": "q", "answer": "1", "image": b""}, "missing_image", "image"),
    (
      {"question": "q", "answer": "1", "options": "x"},
      "bad_choices",
      "options",
    ),
    ({"messages": [{"role": "bot9", "content": "q"}]}, "unknown_role", "bot9"),
  ],
)
def test_a_bad_row_is_a_reject_that_names_column_and_remedy(row, reason, words):
  error = reject(**row)
  assert error.reason == reason and words in error.detail


def test_later_rows_may_have_what_the_first_ones_lack():
  text = {"question": "q", "answer": "1"}
  for sample in ([text], [{**text, "image": None}]):
    found = columns.choose(sample, {})
    row = files.Row({**text, "image": struct(2)}, read_file)
    made = columns.to_problem(row, found, 3, columns.Settings())
    assert made.images == (png(2),)


def test_records_of_two_kinds_have_each_their_columns():
  rows: list[dict] = [{"question": "q", "answer": "1"} for _ in range(8)]
  rows += [{"problem": "p", "solution": "It is \\boxed{2}."}] * 2
  assert [(x.question, x.answer) for x in problems(rows)] == (
    [("q", "1")] * 8 + [("p", "2")] * 2
  )
  # A hole is no record of another kind.
  rows = [{"question": "q", "answer": "1", "label": 7} for _ in range(20)]
  rows[3]["answer"] = None
  with pytest.raises(records.BadRecord, match="answer is empty"):
    problems(rows)


def test_ids_that_repeat_name_no_record():
  rows = [
    {"id": i // 2, "idx": i, "question": "q", "answer": "1"} for i in range(4)
  ]
  assert [each.pid for each in problems(rows)] == ["0", "1", "2", "3"]
  assert problems(rows)[3].metadata == {"id": 1}
  rows = [{**row, "idx": 0} for row in rows]
  assert [each.pid for each in problems(rows)] == ["0", "1", "2", "3"]


def test_metadata_are_json_without_pictures_and_bounded():
  deep: list = []
  for _ in range(50):
    deep = [deep]
  made = problem(
    question="q",
    answer="1",
    image="images/1.png",
    thumb={"bytes": png(1), "w": 8},
    raw=png(1),
    deep=deep,
    long="x" * 40_000,
    nan=float("nan"),
    odd="a\x00\ud800b",
    task=["counting"],
    skills=[1, "x"],
    source="Geometry3K",
  )
  assert made.metadata == {
    "thumb": {"bytes": None, "w": 8},
    "odd": "ab",
    "task": '["counting"]',
    "skills": ["1", "x"],
    "source": "Geometry3K",
  }


def official_rows():
  spec = synthetic.Spec(
    num_problems=40,
    seed=0,
    difficulty=2,
    kinds=synthetic.KINDS,
    image_size=32,
    multi_choice_share=0.5,
    min_options=2,
    max_options=4,
  )
  for each in synthetic.problems(spec):
    row = dataclasses.asdict(each)
    (image,) = row.pop("images")
    path = row["image"] = row.pop("image_path")
    row = {k: v for k, v in row.items() if k not in ("completions", "aliases")}
    row["choices"] = list(row["choices"]) or None
    yield row | {"decoded_image": {"bytes": image, "path": path}}


def test_mathvistas_schema_is_read_as_ever():
  rows = list(official_rows())
  rows[0] |= {"tolerance": 0.1, "answer_type": "integer", "answer": "3"}
  rows[0] |= {"question_type": "free_form", "choices": None}
  assert problems(rows) == [
    dataclasses.replace(
      records.from_result(row),
      images=(row["decoded_image"]["bytes"],),
      metadata=row["metadata"] | {"official_rule": "mathvista"},
    )
    for row in rows
  ]
  assert all("Hint: Please answer" in each.query for each in problems(rows))


def test_harmless_spellings_of_mathvistas_schema_are_healed():
  expected = problems(list(official_rows()))
  rows = []
  for row in official_rows():
    is_choice = row["question_type"] == "multi_choice"
    row["question_type"] = "multi-choice" if is_choice else "Free form"
    if is_choice:
      row["answer_type"] = "string"
      letters = [chr(65 + i) for i in range(len(row["choices"]))]
      row["answer"] = letters[row["choices"].index(row["answer"])]
      row["choices"] = dict(zip(letters, row["choices"], strict=True))
    elif row["answer_type"] == "integer":
      row["answer"] = int(row["answer"])
    elif row["answer_type"] == "float":
      row["precision"] = None
    rows.append(row)
  assert problems(rows) == expected
  choice = next(x for x in official_rows() if x["choices"])
  (made,) = problems([choice | {"choices": [1, 2.5], "answer": 2.5}])
  assert (made.choices, made.answer) == (("1", "2.5"), "2.5")
  with pytest.raises(records.BadRecord, match="answer_not_in_choices"):
    problems([choice | {"choices": []}])


def test_an_unknown_type_is_a_reject_that_names_the_known_ones():
  rows = list(official_rows())
  found = columns.choose(rows, {})
  row = files.Row(rows[0] | {"question_type": "essay"}, read_file)
  with pytest.raises(
    records.BadRecord, match="'essay' is none of multi_choice"
  ):
    columns.to_problem(row, found, 0, columns.Settings())
