import dataclasses

import pytest

from data_pipelines import validation
from data_pipelines.sources import intake, near_duplicates, splits


def record(pid, *groups, split="", is_hidden=False):
  return intake.Record(
    split=split,
    index=0,
    pid=pid,
    groups=groups or (pid,),
    is_hidden=is_hidden,
    is_mathvista=False,
    digest=f"digest of {pid}",
  )


class Looks(near_duplicates.Looks):
  """Takes images for copies whose names begin alike."""

  def __init__(self):
    pass

  def find(self, names, others):
    return {
      name: other for name in names for other in others if name[0] == other[0]
    }


def withhold(records, sides, near="exact", excluded=()):
  indices, reasons = splits.withhold(
    records, sides, near=near, looks=Looks(), excluded=dict(excluded)
  )
  assert list(reasons) == sorted(reasons)
  found = {}
  for reason, pairs in reasons.items():
    for pid, twin in (pair.split(" ~ ") for pair in pairs):
      found[pid] = (reason, twin)
  assert {records[i].pid for i in indices} == found.keys()
  return found


@pytest.mark.parametrize(
  "names, given, expected",
  [
    ([""], [], {"": "divided"}),
    (["train"], [], {"train": "divided"}),
    (["train", "test"], [], {"train": "train", "test": "eval"}),
    (
      ["Train", "val", "test"],
      [],
      {"Train": "train", "val": "eval", "test": "test"},
    ),
    (["train", "dev", "extra"], [], {"train": "train", "dev": "eval"}),
    (["testmini", "test"], [], {"testmini": "divided", "test": "divided"}),
    (["train", "test"], ["test"], {"test": "divided"}),
    (["a", "b", "c"], ["a", "b"], {"a": "divided", "b": "divided"}),
    (["a", "b"], ["train=b", "eval=a"], {"b": "train", "a": "eval"}),
    (["a", "b"], ["train=a", "test=b"], {"a": "divided", "b": "test"}),
  ],
)
def test_each_split_of_the_source_has_a_place(names, given, expected):
  assert splits.plan(names, given) == expected


def test_a_path_for_each_of_our_splits_needs_no_names():
  names = ["train/test", "eval/a", "eval/b"]
  assert splits.plan(names, are_ours=True) == {
    "train/test": "train",
    "eval/a": "eval",
    "eval/b": "eval",
  }


@pytest.mark.parametrize(
  "given", [["c"], ["a", "a"], ["ours=a"], ["a", "eval=b"], ["train="]]
)
def test_a_split_that_is_not_there_is_refused_by_name(given):
  with pytest.raises(validation.SettingError, match=r"^split \(.*\) must "):
    splits.plan(["a", "b"], given)


def test_the_log_says_which_split_came_from_where():
  said = splits.describe(
    {"train": "train", "test": "eval"}, ["train", "test", "x"]
  )
  for words in ("train is 'train'", "eval is 'test'", "left out: 'x'"):
    assert words in said


def test_hidden_answers_are_for_test_and_others_follow_their_group():
  records = [record(str(i)) for i in range(50)]
  records.append(record("hidden", is_hidden=True))
  sides = splits.assign(
    records, {"": splits.DIVIDED}, salt="a", eval_fraction=0.5
  )
  assert sides[-1] == "test" and {"train", "eval"} == set(sides[:-1])
  for each, side in zip(records[:-1], sides, strict=False):
    in_eval = splits.position(each.pid, "a") < 0.5
    assert side == ("eval" if in_eval else "train")


def test_a_problem_of_several_images_follows_the_first():
  records = [record(f"{i}", f"{i}", "shared") for i in range(50)]
  alone = [record(f"{i}") for i in range(50)]
  sides = [
    splits.assign(each, {"": splits.DIVIDED}, salt="a", eval_fraction=0.5)
    for each in (records, alone)
  ]
  assert sides[0] == sides[1]


def test_what_eval_or_test_shows_is_withheld_from_train():
  records = [
    record("a", "one", "two"),
    record("b", "two", "three"),
    record("c", "three"),
    record("d", "four"),
    record("e", "four"),
    record("f", "text-1"),
    record("g", "text-1"),
  ]
  sides = ["train", "eval", "train", "test", "train", "train", "eval"]
  expected = {
    "a": ("same_image", "b"),
    "c": ("same_image", "b"),
    "e": ("same_image", "d"),
    "f": ("same_question", "g"),
  }
  assert withhold(records, sides) == expected
  assert withhold(records[::-1], sides[::-1]) == expected
  assert withhold(records, sides, near="none") == {}


def test_copies_are_withheld_if_asked():
  records = [record("a", "x1"), record("b", "x2"), record("c", "y")]
  sides = ["train", "eval", "train"]
  assert withhold(records, sides) == {}
  assert withhold(records, sides, near="perceptual") == {
    "a": ("similar_image", "b")
  }


def test_what_a_data_dir_holds_never_trains():
  records = [record("a", "x1"), record("b", "y1"), record("c", "z")]
  excluded = {"x1": "7 of DIR", "y2": "8 of DIR"}
  sides = ["train"] * 3
  same = {"a": ("excluded_same_image", "7 of DIR")}
  assert withhold(records, sides, near="none", excluded=excluded) == same
  for near in ("exact", "perceptual"):
    assert withhold(records, sides, near=near, excluded=excluded) == same | {
      "b": ("excluded_similar_image", "8 of DIR")
    }
  # What it evaluates may stay.
  assert withhold(records, ["eval"] * 3, excluded=excluded) == {}


@pytest.mark.parametrize("count", range(1, 12, 3))
def test_added_records_move_no_other(count):
  """An added duplicate may only withhold a record of train."""
  records = [record(f"{i}", f"{i // 3}", f"{i % 5}") for i in range(12)]

  def sides(chosen):
    found = splits.assign(
      chosen, {"": splits.DIVIDED}, salt="a", eval_fraction=0.4
    )
    withheld, _ = splits.withhold(
      chosen, found, near="exact", looks=Looks(), excluded={}
    )
    for i in withheld:
      found[i] = "withheld"
    return {each.pid: side for each, side in zip(chosen, found, strict=True)}

  few, many = sides(records[:count]), sides(records)
  moved = {(few[pid], many[pid]) for pid in few if few[pid] != many[pid]}
  assert moved <= {("train", "withheld")}
  assert sides(records[::-1]) == many


def test_the_fingerprint_sees_records_and_their_splits_but_no_order():
  one, two = record("1"), record("2")
  expected = splits.fingerprint({"train": [one, two], "eval": []})
  assert splits.fingerprint({"eval": [], "train": [two, one]}) == expected
  changed = dataclasses.replace(two, digest="other")
  for other in (
    {"train": [one], "eval": [two]},
    {"train": [one]},
    {"train": [one, changed]},
  ):
    assert splits.fingerprint(other) != expected


GROUPS = [f"group {i}" for i in range(4000)]


def held_out(fraction, salt="a"):
  return {group for group in GROUPS if splits.position(group, salt) < fraction}


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
  places = [splits.position(group, "a") for group in GROUPS[:5]]
  in_eval = [place < 0x5500 / 0x10000 for place in places]
  assert in_eval == [False, False, True, False, True]
