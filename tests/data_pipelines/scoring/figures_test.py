"""Each record counts once overall and once in each slice that it names."""

from data_pipelines.scoring import figures


def record(question_type, task=None, skills=(), **metadata):
  return {
    "question_type": question_type,
    "answer_type": "integer",
    "choices": ["a", "b"],
    "metadata": {"task": task, "skills": list(skills)} | metadata,
  }


def rows(graded):
  records, is_right = zip(*graded, strict=True)
  return [
    (x["dimension"], x["name"], x["way"]["right"], x["way"]["problems"])
    for x in figures.table(records, {"way": is_right})
  ]


def test_slices_count_each_problem_once_per_dimension():
  graded = [
    (record("free_form", "vqa", ["b", "a"]), True),
    (record("free_form", "vqa", ["a", "a"]), False),
    (record("multi_choice", "geo", grade="high"), True),
  ]
  got = rows(graded)
  assert got == [
    ("overall", "all", 2, 3),
    ("question_type", "free_form", 1, 2),
    ("question_type", "multi_choice", 1, 1),
    ("answer_type", "integer", 2, 3),
    ("task", "geo", 1, 1),
    ("task", "vqa", 1, 2),
    ("grade", "high", 1, 1),
    ("skill", "a", 1, 2),
    ("skill", "b", 1, 1),
  ]
  assert rows(graded[::-1]) == got


def test_a_record_without_attributes_is_in_no_slice():
  graded = [({"metadata": None, "question_type": None}, True)]
  assert rows(graded) == [("overall", "all", 1, 1)]
  unreadable = record("free_form", "vqa") | {"pid": "unreadable:3"}
  assert rows([(unreadable, False)]) == [("overall", "all", 0, 1)]
