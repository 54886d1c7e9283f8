import pytest

from data_pipelines.sources import splits

GROUPS = [f"group {i}" for i in range(4000)]


def held_out(fraction, salt="a"):
  return {
    group
    for group in GROUPS
    if splits.split_of(group, salt=salt, eval_fraction=fraction) == "eval"
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
    splits.split_of(group, salt="a", eval_fraction=0x5500 / 0x10000)
    for group in GROUPS[:5]
  ]
  assert sides == ["train", "train", "eval", "train", "eval"]
