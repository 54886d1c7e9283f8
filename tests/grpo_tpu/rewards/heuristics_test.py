"""Heuristics: they reward prose within their bounds, and no spam."""

import hypothesis
import pytest
from hypothesis import strategies

from grpo_tpu.rewards import heuristics

ENGLISH = (
  "There are three red circles on the left side of the picture. I also see "
  "two blue ones near the top. Because three and two make five, the picture "
  "holds five circles. Therefore the total number of circles must be five. "
  "If one of them were hidden, the count would be lower."
)
CHINESE = (
  "\u56e0\u4e3a\u5de6\u8fb9\u6709\u4e09\u4e2a\u7ea2\u8272\u7684\u5706"
  "\u5f62\u3002\u7136\u540e\u53f3\u8fb9\u8fd8\u6709\u4e24\u4e2a\u84dd"
  "\u8272\u7684\u65b9\u5757\u3002\u6240\u4ee5\u56fe\u7247\u91cc\u4e00"
  "\u5171\u6709\u4e94\u4e2a\u4e0d\u540c\u7684\u7269\u4f53\u3002"
)
REWARDS = {
  heuristics.length: heuristics.MAX_LENGTH,
  heuristics.reasoning_words: heuristics.MAX_REASONING_WORDS,
  heuristics.coherence: heuristics.MAX_COHERENCE,
}
SPAM = {
  "connectives": "Therefore because since thus hence. " * 20,
  "one word": "the " * 300,
  "one sentence": "There are five red circles here. " * 30,
  "two sentences": "I see five red ones here. So we have five of them. " * 30,
  "letters": "a b c d " * 50,
  "chinese": "\u56e0\u4e3a\u6240\u4ee5\u56e0\u6b64\u3002" * 20,
  "marks": "..." * 100,
  "nothing": "",
}


def score(reward, text):
  return reward(heuristics.read(text))


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("text", SPAM.values(), ids=SPAM)
def test_spam_scores_zero(reward, text):
  assert score(reward, text) == 0.0


@pytest.mark.parametrize(("reward", "most"), REWARDS.items())
def test_reasoning_scores_close_to_the_maximum(reward, most):
  assert score(reward, ENGLISH) >= 0.9 * most
  assert score(reward, CHINESE) >= 0.7 * most


@pytest.mark.parametrize(("reward", "most"), REWARDS.items())
@hypothesis.given(
  text=strategies.text()
  | strategies.lists(
    strategies.sampled_from(
      ["Because ", "red ", "one ", "five ", ". ", "\n", "\u6240\u4ee5", "7"]
    )
  ).map("".join)
)
@hypothesis.settings(deadline=None, derandomize=True)
def test_no_text_exceeds_the_maximum(reward, most, text):
  assert 0.0 <= score(reward, text) <= most


def test_length_counts_trigrams():
  """Five different words have three of the forty trigrams for a full score."""
  assert score(heuristics.length, "one two three four five") == pytest.approx(
    0.5 * 3 / 40
  )


def test_a_repetition_lowers_the_length_reward():
  once = "I see one red circle and two blue squares here."
  assert score(heuristics.length, once) > 0
  assert score(heuristics.length, f"{once} {once}") < 0.5 * score(
    heuristics.length, once
  )


def test_the_length_reward_fades_for_overlong_text():
  words = [f"word{i}" for i in range(1600)]
  lengths = [
    score(heuristics.length, " ".join(words[:count]))
    for count in (40, 42, 800, 1200, 1600)
  ]
  assert lengths == pytest.approx([0.475, 0.5, 0.5, 0.25, 0.0])


def test_a_connective_counts_once():
  one = "Because three and two make five, we have five. "
  two = one + "Because four and one make five as well, we are sure."
  assert score(heuristics.reasoning_words, one) == pytest.approx(0.1)
  assert score(heuristics.reasoning_words, two) == pytest.approx(0.1)


def test_a_connective_must_join_other_words():
  assert score(heuristics.reasoning_words, "Because red.") == 0.0
  assert score(heuristics.reasoning_words, "Sincerely yours, my dear son.") == 0


def test_a_connective_used_too_often_does_not_count():
  lines = [f"So the {i} bar is near the {i + 1} line." for i in range(5)]
  assert score(heuristics.reasoning_words, "\n".join(lines[:4])) > 0
  assert score(heuristics.reasoning_words, "\n".join(lines)) == 0


@pytest.mark.parametrize(
  "sentence",
  [
    "there are five red circles here.",
    "There are five red circles here",
    "Five circles.",
    "Red red red red red circle.",
    "Because since so then red circles.",
  ],
  ids=["no capital", "no end", "short", "repetitive", "connectives"],
)
def test_a_broken_sentence_is_not_coherent(sentence):
  assert score(heuristics.coherence, sentence) == 0.0
  whole = "I see two blue squares."
  assert score(heuristics.coherence, whole) == pytest.approx(0.2)
  assert score(heuristics.coherence, f"{whole}\n{sentence}") == 0.0
  assert score(
    heuristics.coherence, f"{whole} There is one more.\n{sentence}"
  ) == pytest.approx(0.2 / 3)


def test_a_decimal_point_does_not_end_a_sentence():
  text = "The red bar is 2.5 units high."
  assert heuristics.read(text).sentences == [text]
