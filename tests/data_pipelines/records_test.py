import dataclasses
import pickle

import hypothesis
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st

from data_pipelines import records

ROW = {
  "pid": "7",
  "question": "How long is it?",
  "image": "images/7.jpg",
  "decoded_image": {"bytes": b"\x89PNG", "path": "7.jpg"},
  "choices": None,
  "unit": None,
  "precision": None,
  "answer": "3",
  "question_type": "free_form",
  "answer_type": "integer",
  "metadata": {"source": "TQA", "skills": ["arithmetic reasoning"]},
  "query": None,
}
CHOICE = {
  **ROW,
  "choices": ["3", "4", "4"],
  "question_type": "multi_choice",
  "answer_type": "text",
}


def nest(depth, inside=1):
  for _ in range(depth):
    inside = [inside]
  return inside


def fixture_rows(fixtures):
  folder = fixtures / "mathvista_schema" / "data"
  for path in sorted(folder.glob("*.parquet")):
    yield from pq.read_table(path).to_pylist()


def test_every_shipped_query_is_rebuilt_byte_for_byte(fixtures):
  rows = list(fixture_rows(fixtures))
  for row in rows:
    assert records.from_result({**row, "query": None}).query == row["query"]
  assert len(rows) == 383


def test_every_record_of_the_snapshot_is_valid(fixtures):
  for row in fixture_rows(fixtures):
    records.validate(records.from_result(row))


@pytest.mark.parametrize(
  "change, query",
  [
    (
      {"answer_type": "list", "unit": "years"},
      "Hint: Please answer the question requiring a Python list as an answer "
      "and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the "
      "end.\nQuestion: How long is it? (Unit: years)",
    ),
    (
      {"answer_type": "float", "precision": 2.0},
      "Hint: Please answer the question requiring a floating-point number with "
      "two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, "
      "at the end.\nQuestion: How long is it?",
    ),
    (
      {"question": "Which? "},
      "Hint: Please answer the question requiring an integer answer and "
      "provide the final value, e.g., 1, 2, 3, at the end.\nQuestion: Which?",
    ),
    (
      CHOICE,
      "Hint: Please answer the question and provide the correct option letter, "
      "e.g., A, B, C, D, at the end.\nQuestion: How long is it?\nChoices:\n"
      "(A) 3\n(B) 4\n(C) 4",
    ),
  ],
  ids=["list and unit", "two decimals", "stripped", "choices"],
)
def test_queries_the_snapshot_lacks_follow_the_published_rule(change, query):
  assert records.from_result({**ROW, **change}).query == query


def test_a_shipped_query_is_kept_even_where_it_differs():
  assert records.from_result({**ROW, "query": " As is. "}).query == "As is."


@pytest.mark.parametrize(
  "precision, whole",
  [(None, -1), (float("nan"), -1), (2.0, 2), (1, 1)],
)
def test_precision_may_be_null_float_or_int(precision, whole):
  problem = records.from_result({**ROW, "precision": precision})
  assert problem.precision == whole
  assert isinstance(problem.precision, int)


def test_nulls_are_empty_and_a_null_answer_is_none_given():
  problem = records.from_result({**ROW, "answer": None, "metadata": None})
  assert (problem.choices, problem.unit, problem.metadata) == ((), "", {})
  assert not problem.is_checkable
  assert records.from_result(ROW).is_checkable


@pytest.mark.parametrize(
  "change, reason",
  [
    ({"pid": None}, "missing_pid"),
    ({"pid": " "}, "missing_pid"),
    ({"pid": 7}, "not_text"),
    ({"question": "\n"}, "empty_question"),
    ({"question_type": "essay", "query": "?"}, "unknown_question_type"),
    ({"answer_type": "date"}, "unknown_answer_type"),
    ({"answer_type": "date", "query": "?"}, "unknown_answer_type"),
    ({"answer_type": "float"}, "bad_precision"),
    ({"answer_type": "float", "precision": 0, "query": "?"}, "bad_precision"),
    ({"precision": 1.5}, "bad_precision"),
    ({"precision": float("inf")}, "bad_precision"),
    ({"precision": "two"}, "bad_precision"),
    ({"precision": 10**400}, "bad_precision"),
    ({"precision": 10**5000}, "bad_precision"),
    ({"precision": 2**31}, "bad_precision"),
    ({"precision": -1e300}, "bad_precision"),
    ({"question": "a \ud800 b"}, "not_text"),
    ({"query": "a \ud800 b"}, "not_text"),
    ({"pid": "\udfff"}, "not_text"),
    ({**CHOICE, "choices": ["3", "\ud800"]}, "not_text"),
    ({"solution": "a \0 b"}, "not_text"),
    ({"question": "a" * (records.MAX_TEXT + 1)}, "text_too_long"),
    ({"image": {"bytes": b"1"}}, "not_text"),
    ({"choices": "AB"}, "not_a_list"),
    ({"choices": [3, 4]}, "not_text"),
    ({"metadata": "none"}, "bad_metadata"),
    ({"metadata": {"skills": {1}}}, "bad_metadata"),
    ({"metadata": {"skills": 3}}, "bad_metadata"),
    ({"metadata": {"skills": ["a", ["b"]]}}, "bad_metadata"),
    ({"metadata": {"source": ["a"]}}, "bad_metadata"),
    ({"metadata": {"source": {}}}, "bad_metadata"),
    ({"metadata": {"grade": [4]}}, "bad_metadata"),
    ({"metadata": {"more": nest(5000)}}, "bad_metadata"),
    ({"metadata": {"more": nest(records.MAX_DEPTH + 1)}}, "bad_metadata"),
    ({"metadata": {"more": "\ud800"}}, "not_text"),
    ({"metadata": {"\ud800": 1}}, "not_text"),
    ({"metadata": {"more": 10**5000}}, "bad_metadata"),
    ({"metadata": {"more": "a" * records.MAX_TEXT}}, "text_too_long"),
    ({**CHOICE, "answer": "5"}, "answer_not_in_choices"),
    ({**CHOICE, "choices": None}, "bad_choices"),
    ({**CHOICE, "choices": ["3"] * 27}, "bad_choices"),
    ({**CHOICE, "answer_type": "integer"}, "mismatched_types"),
  ],
)
def test_a_bad_record_says_why(change, reason):
  with pytest.raises(records.BadRecord) as caught:
    records.validate(records.from_result({**ROW, **change}))
  assert caught.value.reason == reason


@pytest.mark.parametrize(
  "change",
  [
    {},
    {"answer": None},
    {**CHOICE, "choices": ["3"]},
    CHOICE,
    {**CHOICE, "answer": None},
    {"question": "图中有几个圆?", "answer_type": "list", "answer": "[1, 2]"},
    {"answer_type": "float", "precision": 3.0, "answer": "1.125"},
  ],
  ids=["plain", "hidden", "one", "twice", "hidden choice", "chinese", "float"],
)
def test_unusual_records_are_not_bad(change):
  records.validate(records.from_result({**ROW, **change}))


@pytest.mark.parametrize(
  "metadata",
  [{"skills": "a"}, {"grade": 4}, {"source": None}, {"more": nest(20)}],
)
def test_harmless_metadata_are_kept(metadata):
  records.validate(records.from_result({**ROW, "metadata": metadata}))


def test_a_stored_problem_of_bad_metadata_is_a_bad_record():
  """A data dir may come from an older version, which did not look."""
  example = records.to_example(records.from_result(ROW))
  with pytest.raises(records.BadRecord, match="bad_metadata"):
    records.from_example({**example, "metadata": '{"skills": 3}'})


@pytest.mark.parametrize(
  "change",
  [
    {"decoded_image": None, "image": {"bytes": b"\x89PNG" * 10**6}},
    {"decoded_image": None, "image": [{"bytes": b"\x89PNG" * 10**6}]},
    {"answer_type": "\x89PNG" * 10**6, "query": "?"},
    {**CHOICE, "answer": "\x1b[2J\x89PNG" * 10**6},
  ],
)
def test_a_detail_is_short_printable_and_shows_no_picture(change):
  with pytest.raises(records.BadRecord) as caught:
    records.validate(records.from_result({**ROW, **change}))
  detail = caught.value.detail
  assert len(detail) <= 300 and detail.isprintable()
  assert "PNGPNG" not in detail and "PNG\\x89PNG\\x89PNG" not in detail


def test_any_exception_of_a_record_is_its_own():
  for error in (RecursionError("a\x1b"), OverflowError(), KeyError("a")):
    with pytest.raises(records.BadRecord) as caught:
      with records.all_faults("slug"):
        raise error
    assert caught.value.reason == "slug"
    assert type(error).__name__ in caught.value.detail
    assert "\x1b" not in caught.value.detail
  with pytest.raises(records.BadRecord, match="^first: a$"):
    with records.all_faults("slug"):
      raise records.BadRecord("first", "a")


def test_a_reason_survives_the_way_back_from_a_worker():
  error = pickle.loads(pickle.dumps(records.BadRecord("slug", "detail")))
  assert (error.reason, str(error)) == ("slug", "slug: detail")


# TFDS stores UTF-8, which has no lone surrogates.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PROBLEMS = st.builds(
  records.Problem,
  **{
    f.name: TEXT for f in dataclasses.fields(records.Problem) if f.type is str
  },
  images=st.lists(st.binary()).map(tuple),
  aliases=st.lists(TEXT).map(tuple),
  tolerance=st.floats(0, 0.9),
  completions=st.lists(
    st.builds(records.LabelledCompletion, TEXT, st.floats(-9, 9))
  ).map(tuple),
  choices=st.lists(TEXT).map(tuple),
  precision=st.integers(-1, 9),
  metadata=st.dictionaries(TEXT, TEXT | st.lists(TEXT) | st.integers()),
)


@hypothesis.given(PROBLEMS)
@hypothesis.settings(deadline=None, max_examples=50)
def test_an_example_holds_the_whole_problem(problem):
  example = records.to_example(problem)
  assert records.from_example(example) == problem
  as_read = {
    name: value.encode() if isinstance(value, str) else value
    for name, value in example.items()
  }
  as_read["choices"] = [choice.encode() for choice in example["choices"]]
  assert records.from_example(as_read) == problem


NOISE = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats()
  | st.text(max_size=5)
  | st.binary(max_size=5),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=5,
)


@hypothesis.given(
  st.dictionaries(st.sampled_from(sorted(ROW)), NOISE, max_size=3)
)
@hypothesis.settings(deadline=None, derandomize=True, max_examples=300)
def test_whatever_a_row_holds_it_is_a_problem_or_a_bad_record(change):
  row = {**ROW, **change}

  def outcome():
    try:
      problem = records.from_result(row)
      records.validate(problem)
    except records.BadRecord as error:
      return error.reason
    return problem

  first = outcome()
  assert repr(first) == repr(outcome())
  if not isinstance(first, str):
    problem = records.from_example(records.to_example(first))
    assert records.to_example(problem) == records.to_example(first)
