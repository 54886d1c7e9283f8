"""The <answer> tag, and the reasoning outside of the tag."""

import pytest

from grpo_tpu.rewards import accuracy


@pytest.mark.parametrize(
  ("completion", "expected"),
  [
    ("<answer>5</answer>", 1.0),
    ("I count.\n<answer> red </answer>\n", 1.0),
    ("<answer>\u4e94</answer>", 1.0),
    ("", 0.0),
    ("5", 0.0),
    ("<answer>5", 0.0),
    ("5</answer>", 0.0),
    ("</answer>5<answer>", 0.0),
    ("<answer></answer>", 0.0),
    ("<answer> </answer>", 0.0),
    ("<answer>...</answer>", 0.0),
    ("<answer>4</answer> <answer>5</answer>", 0.0),
    ("<answer><answer>5</answer>", 0.0),
    ("<answer>5</answer></answer>", 0.0),
    ("<Answer>5</Answer>", 0.0),
    ("<think>Maybe <answer>4</answer>?</think><answer>5</answer>", 1.0),
    ("<think>So <answer>5</answer></think>", 0.0),
    ("<think>So <answer>5</answer>", 0.0),
  ],
)
def test_format_is_exactly_one_tag_with_content(completion, expected):
  assert accuracy.well_formed(completion) == expected


@pytest.mark.parametrize(
  ("completion", "outside"),
  [
    ("One. <answer>5</answer> Two.", "One. \n Two."),
    ("One.", "One."),
    ("One. <answer>5", "One. "),
    ("<answer>5</answer>", "\n"),
  ],
)
def test_reasoning_is_the_text_outside_the_tag(completion, outside):
  assert accuracy.reasoning(completion) == outside
