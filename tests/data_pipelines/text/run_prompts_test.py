"""System texts and solved examples stand where the released models saw them."""

import dataclasses
import re

import pytest

from data_pipelines import records
from data_pipelines.text import chat_prompts, run_prompts
from data_pipelines.text import tokenizer as tokens
from data_pipelines.text.chat_format import GEMMA3


def make_problem(number, *, solution="", images=(), **changes):
  problem = records.Problem(
    pid=str(number),
    question=f"What is {number} plus 1?",
    answer=str(number + 1),
    solution=solution,
    images=images,
    question_type="free_form",
    answer_type="integer",
  )
  problem = dataclasses.replace(problem, query=records.plain_query(problem))
  return dataclasses.replace(problem, **changes)


TRAIN = [make_problem(i, solution=f"{i} and 1.") for i in range(30)]
ASKED = make_problem(99)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
  tokens.train(map(chat_prompts.chat_text, TRAIN), path, vocab_size=512)
  return tokens.Tokenizer(path)


def complete(name="plain", *, system="", few_shot=0, seed=0, train=TRAIN):
  return run_prompts.complete(
    chat_prompts.open_template(name, system),
    few_shot=few_shot,
    seed=seed,
    train=[train],
    asked=[train],
  )


def layout_ids(text, tokenizer):
  """The ids of a text that writes out the tokens of its turns."""
  ids = {name: token for token, name in GEMMA3.names.items()}
  parts = re.split("(<bos>|<start_of_turn>|<end_of_turn>)", text)
  return [
    token
    for part in parts
    for token in ([ids[part]] if part in ids else tokenizer.encode(part))
  ]


SYSTEM = "You are exact.\nAnswer in digits. "


def test_a_system_text_opens_the_users_turn_as_in_gemmas_template(tokenizer):
  template = complete("boxed", system=SYSTEM)
  ids = chat_prompts.encode_prompt(
    ASKED, tokenizer, soft_tokens=2, template=template
  )
  assert ids == layout_ids(
    "<bos><start_of_turn>user\nYou are exact.\nAnswer in digits. \n\n"
    "What is 99 plus 1?\nWrite the final answer as \\boxed{...}."
    "<end_of_turn>\n<start_of_turn>model\n",
    tokenizer,
  )


def test_a_system_text_comes_before_the_pictures_of_its_turn(tokenizer):
  """And a mark in it is no picture."""
  template = complete(system=f"{SYSTEM}<image>")
  asked = make_problem(99, images=(b"1",), query="See <image> there.")
  image = [108, tokenizer.start_of_image, -2, -2, tokenizer.end_of_image, 108]
  assert chat_prompts.encode_prompt(
    asked, tokenizer, soft_tokens=2, template=template
  ) == [
    *layout_ids(
      f"<bos><start_of_turn>user\n{SYSTEM}<image>\n\nSee ", tokenizer
    ),
    *image,
    *layout_ids(" there.<end_of_turn>\n<start_of_turn>model\n", tokenizer),
  ]


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_examples_are_earlier_turns_with_right_completions(tokenizer, system):
  template = complete("reasoned", system=system, few_shot=2)
  first, second, _ = template.examples
  asks = (
    "Write your reasoning as <reasoning>...</reasoning>, then the final answer "
    "as <answer>...</answer>."
  )

  def turns(i):
    return (
      f"What is {i} plus 1?\n{asks}<end_of_turn>\n<start_of_turn>model\n"
      f"<reasoning>{i} and 1.</reasoning> <answer>{int(i) + 1}</answer>"
      "<end_of_turn>\n<start_of_turn>user\n"
    )

  prefix = f"{system}\n\n" if system else ""
  text = (
    f"<bos><start_of_turn>user\n{prefix}{turns(first.pid)}{turns(second.pid)}"
    f"What is 99 plus 1?\n{asks}<end_of_turn>\n<start_of_turn>model\n"
  )
  ids = chat_prompts.encode_prompt(
    ASKED, tokenizer, soft_tokens=2, template=template
  )
  assert ids == layout_ids(text, tokenizer)


def shown(problem, template):
  return [text for text, _ in chat_prompts.earlier_turns(problem, template)]


def test_every_prompt_has_the_same_examples_but_never_the_problem_itself():
  template = complete(few_shot=3)
  usual = shown(ASKED, template)
  assert len(usual) == len(set(usual)) == 3
  for problem in TRAIN:
    if problem.query not in usual:
      assert shown(problem, template) == usual
      continue
    # The spare stands in, and the others stay.
    others = [text for text in usual if text != problem.query]
    assert shown(problem, template)[:2] == others
    assert len(set(shown(problem, template))) == 3
    again = dataclasses.replace(problem, pid="of another set")
    assert problem.query not in shown(again, template)


def test_the_seed_draws_the_examples():
  drawn = [complete(few_shot=4, seed=seed).examples for seed in (0, 0, 1, 2)]
  assert drawn[0] == drawn[1]
  assert len(set(tuple(x.pid for x in each) for each in drawn)) == 3


def test_only_solved_problems_without_pictures_are_examples():
  right = [make_problem(1), make_problem(2)]
  others = [
    make_problem(3, images=(b"1",)),
    make_problem(4, answer=""),
    make_problem(5, answer_type="unchecked"),
    make_problem(6, answer="quite a few"),  # No integer to read.
    make_problem(7, question=right[0].question),
  ]
  template = complete(few_shot=2, train=[*right, *others])
  assert {x.question for x in template.examples} == {x.question for x in right}
  with pytest.raises(ValueError, match=r"few_shot \(3\) must be at most 2"):
    complete(few_shot=3, train=[*right, *others])


class Damaged(list):
  def __getitem__(self, index):
    if index % 2:
      raise records.BadRecord("unreadable", "torn")
    return super().__getitem__(index)


def test_a_damaged_record_is_no_example():
  template = complete(few_shot=14, train=Damaged(TRAIN))
  assert all(int(x.pid) % 2 == 0 for x in template.examples)


def test_a_file_may_place_the_examples_itself(tokenizer, tmp_path):
  path = tmp_path / "base.jinja"
  path.write_text(
    "{% for each in examples %}Q: {{ each.question }}\n"
    "A: {{ each.solution }} {{ each.answer }}|{{ each.completion }}\n\n"
    "{% endfor %}Q: {{ question }}\nA: "
  )
  template = complete(str(path), few_shot=2)
  first, second = (int(x.pid) for x in template.examples[:2])
  assert chat_prompts.prompt_text(ASKED, template=template) == (
    f"Q: What is {first} plus 1?\nA: {first} and 1. {first + 1}|"
    f"{first} and 1. The answer is {first + 1}.\n\n"
    f"Q: What is {second} plus 1?\nA: {second} and 1. {second + 1}|"
    f"{second} and 1. The answer is {second + 1}.\n\n"
    "Q: What is 99 plus 1?\nA:"
  )
  ids = chat_prompts.encode_prompt(
    ASKED, tokenizer, soft_tokens=2, template=template
  )
  assert ids.count(GEMMA3.start_of_turn) == 2
  # A file that does not speak of them has them as turns.
  path.write_text("Here are examples. {{ question }}")
  assert shown(ASKED, complete(str(path), few_shot=2)) == [
    f"Here are examples. What is {i} plus 1?" for i in (first, second)
  ]


@pytest.mark.parametrize("late", [1, 15, 16, 40, 59])
def test_a_file_is_tried_on_problems_from_first_to_last(tmp_path, late):
  """As on each set of a mixture."""
  path = tmp_path / "mine.jinja"
  path.write_text("{{ question }} {{ metadata.level }}")
  problems = [
    make_problem(i, metadata={} if late <= i < late + 20 else {"level": i})
    for i in range(80)
  ]
  with pytest.raises(ValueError, match="'level'"):
    complete(str(path), train=problems)
