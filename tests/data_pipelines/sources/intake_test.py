import dataclasses
import json
import struct
import zlib

from data_pipelines import records
from data_pipelines.sources import files, intake
from data_pipelines.sources.drawn import synthetic
from data_pipelines.sources.rows import columns
from tests.data_pipelines.sources import taken

SPEC = synthetic.Spec(
  num_problems=40,
  seed=0,
  difficulty=1,
  kinds=("count", "total"),
  image_size=32,
  multi_choice_share=0.0,
  min_options=2,
  max_options=4,
)
PROBLEMS = list(synthetic.problems(SPEC))


def bomb():
  """A PNG of a few bytes that claims 51 megapixels."""
  header = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 5_100, 8, 2, 0, 0, 0)
  crc = struct.pack(">I", zlib.crc32(header))
  return (
    b"\x89PNG\r\n\x1a\n"
    + struct.pack(">I", 13)
    + header
    + crc
    + (struct.pack(">I", 100) + b"IDAT")
  )


# For each reason, the changes that make a problem bad.
BAD = {
  "missing_image": {"images": (b"",)},
  "image_too_large": {"images": (bomb(),)},
  "unknown_question_type": {"question_type": "essay"},
  "unknown_answer_type": {"answer_type": "date"},
  "answer_not_in_choices": {
    "question_type": "multi_choice",
    "answer_type": "text",
    "choices": ("a", "b"),
    "answer": "c",
  },
  "missing_pid": {"pid": ""},
  "duplicate_pid": {"pid": PROBLEMS[0].pid},
  "empty_question": {"question": ""},
  "undecodable_image": {"images": (PROBLEMS[0].images[0][:100],)},
  "answer_fails_verifier": {"answer": "a few"},
  "not_text": {"question": "\ud800"},
}


def with_bad():
  return PROBLEMS + [
    dataclasses.replace(PROBLEMS[1], **{"pid": f"bad-{reason}", **change})
    for reason, change in BAD.items()
  ]


def no_file(name):
  raise records.BadRecord("missing_image", f"no {name!r}")


def readers(**problems):
  return {split: lambda p=p: iter(p) for split, p in problems.items()}


CHOSEN = columns.Columns({"question": ("question",), "pid": ("pid",)})


def check(sources, **options):
  chosen = dict.fromkeys(sources, CHOSEN)
  return taken.check(sources, chosen=chosen, **options)


def test_a_bad_record_is_rejected_with_its_reason():
  kept, rejects = check(readers(testmini=with_bad()))
  assert [record.index for record in kept] == list(range(40))
  assert [reject.reason for reject in rejects] == list(BAD)
  assert [reject.index for reject in rejects] == list(range(40, 40 + len(BAD)))
  assert rejects[0].pid == "bad-missing_image"
  json.dumps([dataclasses.asdict(each) for each in rejects])


def test_a_rejected_record_does_not_claim_its_pid():
  bad = dataclasses.replace(PROBLEMS[0], question="")
  kept, rejects = check(readers(testmini=[bad, PROBLEMS[0]]))
  assert len(kept) == len(rejects) == 1


def test_whatever_a_record_raises_is_its_own_reject(monkeypatch):
  verify = intake.verify.verify

  def fail(response, problem):
    if problem.pid == PROBLEMS[3].pid:
      raise RecursionError("too deep\x1b[2J")
    return verify(response, problem)

  monkeypatch.setattr(intake.verify, "verify", fail)
  kept, rejects = check(readers(testmini=PROBLEMS))
  assert len(kept) == 39
  assert rejects[0].reason == "unreadable"
  assert rejects[0].detail == "RecursionError: too deep\\x1b[2J"


def test_the_pid_of_a_reject_is_a_short_text():
  pids = [
    "\x1b[2J",
    "a" * 10**6,
    b"PNG" * 10**6,
    {"a": b"PNG" * 10**6},
    10**5000,
  ]
  rows = [files.Row({"pid": pid}, no_file) for pid in pids]
  _, rejects = check(readers(testmini=rows))
  for reject in rejects:
    assert len(reject.pid) <= 64 and reject.pid.isprintable()
    assert "PNG" not in json.dumps(dataclasses.asdict(reject))


def test_an_unreadable_record_is_rejected_with_its_reason():
  bad = records.BadRecord("unreadable", "torn")
  kept, rejects = check(readers(train=[bad, PROBLEMS[0]]))
  assert [(record.split, record.index) for record in kept] == [("train", 1)]
  assert rejects == [intake.Reject("train", 0, None, "unreadable", "torn")]


def test_a_reject_quotes_no_bytes():
  detail = "cannot read b'\\x89PNG\\r\\n' here"
  bad = records.BadRecord("unreadable", detail)
  _, [reject] = check(readers(train=[bad]))
  assert reject.detail == "cannot read (bytes)"


def test_a_pid_is_taken_once_in_a_split():
  kept, [reject] = check(readers(train=[PROBLEMS[0], *PROBLEMS[:2]]))
  assert [record.index for record in kept] == [0, 2]
  assert (reject.index, reject.reason) == (1, "duplicate_pid")


def test_names_that_start_again_in_another_split_get_its_name():
  renamed = [
    dataclasses.replace(problem, pid=PROBLEMS[i].pid)
    for i, problem in enumerate(PROBLEMS[10:20])
  ]
  both = readers(train=PROBLEMS[:10], test=renamed)
  kept, rejects, problems = taken.check_and_keep(both, chosen={})
  assert not rejects
  pids = [problem.pid for problem in PROBLEMS[:10]]
  expected = pids + [f"test:{pid}" for pid in pids]
  assert [record.pid for record in kept] == expected
  assert [problem.pid for problem in problems] == expected


def test_a_missing_answer_is_a_reject_except_in_test():
  hidden = [dataclasses.replace(p, answer="") for p in PROBLEMS]
  kept, rejects = check(readers(train=hidden[:3], test=hidden[3:5]))
  assert [(record.split, record.is_hidden) for record in kept] == [
    ("test", True),
    ("test", True),
  ]
  assert [reject.reason for reject in rejects] == ["missing_answer"] * 3
  assert "--columns=answer=NAME" in rejects[0].detail
  # Labels can judge without an answer.
  labelled = dataclasses.replace(
    hidden[0], completions=(records.LabelledCompletion("3", 1.0),)
  )
  kept, rejects = check(readers(train=[labelled]))
  assert [record.is_hidden for record in kept] == [False] and not rejects


def test_an_answer_that_no_rule_takes_may_be_kept_unchecked():
  odd = dataclasses.replace(PROBLEMS[0], answer="a few")
  settings = columns.Settings(unchecked_answers="keep")
  _, rejects, [problem] = taken.check_and_keep(
    readers(train=[odd]), chosen={}, settings=settings
  )
  assert not rejects and problem.answer_type == "unchecked"
  _, [reject] = check(readers(train=[odd]))
  assert "--unchecked_answers=keep" in reject.detail


def text(question, *choices):
  return records.Problem(
    pid=question,
    question=question,
    choices=choices,
    answer=choices[0] if choices else "3",
    question_type="multi_choice" if choices else "free_form",
    answer_type="text" if choices else "integer",
  )


def groups(*problems):
  return [intake.hash_groups(problem, False)[0] for problem in problems]


def test_text_problems_share_a_group_if_they_ask_the_same():
  same = groups(
    text("How many  are\nthere?"),
    text("how many are there?"),
    text("\uff28ow many are there?"),
  )
  assert len(set(same)) == 1
  other = groups(
    text("Which is true?", "1 < 2", "2 < 1"),
    text("Which is true?", "2 < 1", "1 < 2"),
    text("Which is true?", "1 < 3", "2 < 1"),
    text("Which is true?"),
  )
  assert other[0] == other[1] and len(set(other)) == 3


def test_a_problem_is_in_the_group_of_each_of_its_images():
  one, two = PROBLEMS[0].images[0], PROBLEMS[1].images[0]
  [both, first, second] = groups(
    *(
      dataclasses.replace(PROBLEMS[0], images=images)
      for images in ((one, two), (one,), (two,))
    )
  )
  assert both == first + second


def test_any_number_of_processes_gives_the_same():
  """More records than one process checks alone, with bad ones among them."""
  many = [
    dataclasses.replace(problem, pid=f"{turn}-{problem.pid}")
    for turn in range(7)
    for problem in with_bad()
  ]
  sources = readers(train=many[:300], test=many[300:])
  results = [
    taken.check_and_keep(sources, num_workers=workers, chosen={})
    for workers in (0, 2)
  ]
  assert results[0] == results[1]
  assert len(results[0][0]) > intake._FEW


def test_the_digest_sees_every_field():
  def digest(problem):
    [record], _ = check(readers(train=[problem]))
    return record.digest

  expected = digest(PROBLEMS[0])
  for field, value in (("solution", "1."), ("metadata", {}), ("unit", "g")):
    changed = dataclasses.replace(PROBLEMS[0], **{field: value})
    assert digest(changed) != expected
