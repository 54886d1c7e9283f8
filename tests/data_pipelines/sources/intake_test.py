import dataclasses
import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines import images, records
from data_pipelines.sources import files, intake, synthetic

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


def placed(sources, fraction=0.5):
  kept, _ = intake.check_records(sources)
  return kept, intake.assign_splits(kept, salt="a", eval_fraction=fraction)


def test_a_bad_record_is_rejected_with_its_reason():
  kept, rejects = intake.check_records(readers(testmini=with_bad()))
  assert [record.key for record in kept] == [("testmini", i) for i in range(40)]
  assert [reject["reason"] for reject in rejects] == list(BAD)
  assert [reject["index"] for reject in rejects] == list(
    range(40, 40 + len(BAD))
  )
  assert rejects[0]["pid"] == "bad-missing_image"
  json.dumps(rejects)


def test_a_rejected_record_does_not_claim_its_pid():
  bad = dataclasses.replace(PROBLEMS[0], question="")
  kept, rejects = intake.check_records(readers(testmini=[bad, PROBLEMS[0]]))
  assert len(kept) == len(rejects) == 1


def test_whatever_a_record_raises_is_its_own_reject(monkeypatch):
  verify = intake.verify.verify

  def fail(response, problem):
    if problem.pid == PROBLEMS[3].pid:
      raise RecursionError("too deep\x1b[2J")
    return verify(response, problem)

  monkeypatch.setattr(intake.verify, "verify", fail)
  kept, rejects = intake.check_records(readers(testmini=PROBLEMS))
  assert len(kept) == 39
  assert rejects[0]["reason"] == "unreadable"
  assert rejects[0]["detail"] == "RecursionError: too deep\\x1b[2J"


def test_the_pid_of_a_reject_is_a_short_text():
  pids = [
    "\x1b[2J",
    "a" * 10**6,
    b"PNG" * 10**6,
    {"a": b"PNG" * 10**6},
    10**5000,
  ]
  rows = [files.Row({"pid": pid}, no_file) for pid in pids]
  _, rejects = intake.check_records(readers(testmini=rows))
  for reject in rejects:
    assert len(reject["pid"]) <= 64 and reject["pid"].isprintable()
    assert "PNG" not in json.dumps(reject)


def test_an_unreadable_record_is_rejected_with_its_reason():
  bad = records.BadRecord("unreadable", "torn")
  kept, rejects = intake.check_records(readers(train=[bad, PROBLEMS[0]]))
  assert [record.key for record in kept] == [("train", 1)]
  assert rejects == [
    {
      "split": "train",
      "index": 0,
      "pid": None,
      "reason": "unreadable",
      "detail": "torn",
    }
  ]


def test_a_pid_is_taken_across_splits():
  kept, rejects = intake.check_records(
    readers(testmini=PROBLEMS[:1], test=PROBLEMS[:1])
  )
  assert [record.key[0] for record in kept] == ["testmini"]
  assert [reject["reason"] for reject in rejects] == ["duplicate_pid"]


def test_an_image_is_in_one_split_only():
  kept, sides = placed(readers(testmini=PROBLEMS))
  groups = {"train": set(), "eval": set()}
  for record in kept:
    groups[sides[record.key]].add(record.group)
  assert all(groups.values())
  assert not groups["train"] & groups["eval"]
  # Some images have two questions, or the test shows nothing.
  assert len(groups["train"] | groups["eval"]) < len(PROBLEMS)


def test_unanswered_problems_are_for_test_and_their_images_not_for_train():
  hidden = [
    dataclasses.replace(problem, pid=f"hidden-{problem.pid}", answer="")
    for problem in PROBLEMS[:20]
  ]
  kept, sides = placed(readers(testmini=PROBLEMS, test=hidden), fraction=0.0)
  assert {sides["test", i] for i in range(20)} == {"test"}
  assert {sides["testmini", i] for i in range(20)} == {"withheld"}
  assert {sides["testmini", i] for i in range(20, 40)} == {"train"}
  alone = placed(readers(train=hidden))[1]
  assert set(alone.values()) == {"test"}


def test_what_the_source_calls_test_stays_test():
  _, sides = placed(readers(test=PROBLEMS))
  assert set(sides.values()) == {"test"}


def copies(problem, count):
  """Real problems whose images look alike and differ in pixels."""
  image = np.array(images.decode(problem.images[0]))
  for i in range(count):
    image[0, 0] = 10 * i
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    yield dataclasses.replace(
      problem,
      pid=f"copy-{problem.pid}-{i}",
      images=(file.getvalue(),),
      metadata={"source": "mine"},
    )


COPIES = [copy for problem in PROBLEMS[:8] for copy in copies(problem, 4)]


def test_duplicates_are_never_in_train_and_eval():
  kept, sides = placed(readers(testmini=COPIES))
  found = {}
  for record in kept:
    found.setdefault(record.group, set()).add(sides[record.key])
  assert len({record.image for record in kept}) == 32
  assert len(found) == 8
  assert {"eval", "withheld"} in found.values()
  assert not any({"eval", "train"} <= group for group in found.values())
  # Records in eval stay there, whatever the split of their duplicates.
  assert {"train"} in found.values() or {"eval"} in found.values()


def test_a_duplicate_of_a_test_image_is_not_for_train():
  hidden = [dataclasses.replace(p, answer="") for p in COPIES[::4]]
  shown = [p for p in COPIES if p not in COPIES[::4]]
  sources = readers(testmini=shown, test=hidden[:4])
  _, sides = placed(sources, fraction=0.0)
  assert [sides["testmini", i] for i in range(24)] == (
    ["withheld"] * 12 + ["train"] * 12
  )
  # Evaluation alone loses nothing.
  _, sides = placed(sources, fraction=1.0)
  assert {sides["testmini", i] for i in range(24)} == {"eval"}


def test_synthetic_images_are_distinguished_by_their_pixels():
  drawn = [
    dataclasses.replace(copy, metadata={"source": "synthetic/count"})
    for copy in COPIES
  ]
  kept, _ = intake.check_records(readers(testmini=drawn))
  assert len({record.group for record in kept}) == len(drawn)
  # Real images have duplicates among real images.
  mixed = [*drawn, *(dataclasses.replace(p, pid=f"{p.pid}+") for p in COPIES)]
  kept, _ = intake.check_records(readers(testmini=mixed))
  assert len({record.group for record in kept}) == 8


@pytest.mark.parametrize("count", range(1, 32, 5))
def test_added_records_move_no_other(count):
  """An added duplicate may only withhold a record of train."""
  _, many = placed(readers(testmini=PROBLEMS + COPIES))
  _, few = placed(readers(testmini=PROBLEMS + COPIES[:count]))
  withdrawn = 0
  for at, side in few.items():
    if many[at] != side:
      assert (side, many[at]) == ("train", "withheld")
      withdrawn += 1
  assert withdrawn <= count
  assert all(many["testmini", i] != "withheld" for i in range(40))


def test_a_split_has_the_assigned_problems_and_can_be_read_twice():
  sources = readers(testmini=with_bad(), test=PROBLEMS[:0])
  _, sides = placed(sources)
  read = []
  for split in ("train", "eval", "test"):
    chosen = list(intake.read_split(sources, sides, split))
    assert list(intake.read_split(sources, sides, split)) == chosen
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
  other = intake.assign_splits(kept, salt="b", eval_fraction=0.5)
  assert intake.fingerprint(kept, sides) != intake.fingerprint(kept, other)


GROUPS = [f"group {i}" for i in range(4000)]


def held_out(fraction, salt="a"):
  return {
    group
    for group in GROUPS
    if intake.split_of(group, salt=salt, eval_fraction=fraction) == "eval"
  }


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.2, 0.5, 1.0])
def test_eval_gets_its_share(fraction):
  # Four standard deviations of a binomial share of 4000.
  tolerance = 4 * (fraction * (1 - fraction) / len(GROUPS)) ** 0.5
  share = len(held_out(fraction)) / len(GROUPS)
  assert abs(share - fraction) <= tolerance


def test_a_larger_share_keeps_what_a_smaller_one_held_out():
  assert held_out(0.1) < held_out(0.2)


def test_another_salt_is_an_independent_division():
  both = held_out(0.5) & held_out(0.5, salt="b")
  assert abs(len(both) / len(GROUPS) - 0.25) < 0.03


def test_membership_is_the_same_on_every_machine():
  """sha256("a|group 0") begins bed5, then b6e1, 544f, c5df, 0e48 (hex)."""
  sides = [
    intake.split_of(group, salt="a", eval_fraction=0x5500 / 0x10000)
    for group in GROUPS[:5]
  ]
  assert sides == ["train", "train", "eval", "train", "eval"]
