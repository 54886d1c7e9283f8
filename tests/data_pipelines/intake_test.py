import dataclasses
import json

from data_pipelines import intake, synthetic

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
# Fields in which a problem of the set differs, one for each way to be bad.
BAD = {
  "missing_pid": {"pid": ""},
  "duplicate_pid": {"pid": PROBLEMS[0].pid},
  "empty_question": {"question": ""},
  "undecodable_image": {"image_bytes": PROBLEMS[0].image_bytes[:100]},
  "answer_fails_verifier": {"answer": "a few"},
}


def with_bad():
  return PROBLEMS + [
    dataclasses.replace(PROBLEMS[1], **{"pid": f"bad-{reason}", **change})
    for reason, change in BAD.items()
  ]


def readers(**problems):
  return {split: lambda p=p: iter(p) for split, p in problems.items()}


def placed(sources, fraction=0.5):
  kept, _ = intake.sift(sources)
  return kept, intake.placed(kept, salt="a", eval_fraction=fraction)


def test_a_bad_record_is_set_aside_with_its_reason():
  kept, rejects = intake.sift(readers(testmini=with_bad()))
  assert [record.at for record in kept] == [("testmini", i) for i in range(40)]
  assert [reject["reason"] for reject in rejects] == list(BAD)
  assert [reject["index"] for reject in rejects] == list(range(40, 45))
  assert rejects[2]["pid"] == "bad-empty_question"
  json.dumps(rejects)


def test_a_rejected_record_does_not_claim_its_pid():
  bad = dataclasses.replace(PROBLEMS[0], question="")
  kept, rejects = intake.sift(readers(testmini=[bad, PROBLEMS[0]]))
  assert len(kept) == len(rejects) == 1


def test_rows_that_are_no_problem_are_set_aside_too():
  rows = [{}, {"pid": "1", "decoded_image": {"bytes": b"GIF89a"}}]
  _, rejects = intake.sift(readers(testmini=rows))
  assert [(r["pid"], r["reason"]) for r in rejects] == [
    (None, "missing_image"),
    ("1", "unknown_answer_type"),
  ]


def test_a_picture_is_on_one_side_only():
  kept, sides = placed(readers(testmini=PROBLEMS))
  groups = {"train": set(), "eval": set()}
  for record in kept:
    groups[sides[record.at]].add(record.group)
  assert all(groups.values())
  assert not groups["train"] & groups["eval"]
  # Some pictures are asked about twice, or nothing was shown.
  assert len(groups["train"] | groups["eval"]) < len(PROBLEMS)


def test_unanswered_problems_are_for_test_and_their_pictures_not_for_train():
  hidden = [
    dataclasses.replace(problem, pid=f"hidden-{problem.pid}", answer="")
    for problem in PROBLEMS[:20]
  ]
  kept, sides = placed(readers(testmini=PROBLEMS, test=hidden), fraction=0.0)
  assert {sides["test", i] for i in range(20)} == {"test"}
  assert {sides["testmini", i] for i in range(14)} == {"eval"}
  assert {sides["testmini", i] for i in range(20, 40)} == {"train"}
  alone = placed(readers(train=hidden))[1]
  assert set(alone.values()) == {"test"}


def test_what_the_source_calls_test_stays_test():
  _, sides = placed(readers(test=PROBLEMS))
  assert set(sides.values()) == {"test"}


def test_added_records_move_no_other():
  _, few = placed(readers(testmini=PROBLEMS[:25]))
  _, many = placed(readers(testmini=PROBLEMS))
  assert few == {at: side for at, side in many.items() if at in few}


def test_chosen_problems_are_those_placed_and_can_be_read_twice():
  sources = readers(testmini=with_bad(), test=PROBLEMS[:0])
  _, sides = placed(sources)
  read = []
  for split in ("train", "eval", "test"):
    chosen = intake.Chosen(sources, sides, split)
    assert list(chosen) == list(chosen)
    read += chosen
  assert sorted(read, key=lambda p: p.pid) == PROBLEMS


def fingerprint(problems):
  return intake.fingerprint(*placed(readers(testmini=problems)))


def test_the_fingerprint_sees_every_field_but_not_the_order():
  expected = fingerprint(PROBLEMS)
  assert fingerprint(PROBLEMS[::-1]) == expected
  assert fingerprint(PROBLEMS[1:]) != expected
  for field, value in (("solution", "1."), ("metadata", {}), ("unit", "g")):
    changed = dataclasses.replace(PROBLEMS[0], **{field: value})
    assert fingerprint([changed, *PROBLEMS[1:]]) != expected


def test_the_fingerprint_sees_the_division():
  kept, sides = placed(readers(testmini=PROBLEMS))
  other = intake.placed(kept, salt="b", eval_fraction=0.5)
  assert intake.fingerprint(kept, sides) != intake.fingerprint(kept, other)
