"""Finds the answer of a completion by rules, and judges it.

The most explicit answer counts: a tag, a box, a bare answer, a sentence that
announces an answer, and last a plain statement. Anything ambiguous is no
answer: missing a right answer costs a policy little, but rewarding a wrong one
teaches it. Every rule takes time linear in the completion. Knows nothing of
rewards, prompt templates or other completions.

References:
  MathVista's own scoring: https://arxiv.org/abs/2310.02255
"""

import dataclasses
import decimal
from collections.abc import Sequence

from data_pipelines import records, tables
from data_pipelines.verifier import free_text, numbers, options, phrases

_RE = tables.patterns("verify")
# The first and last characters that are read of a longer completion.
_HEAD, _TAIL = 1_000, 3_000
# A longer text in a tag is no answer.
_MAX_ANSWER = 400
# A completion with more tags has no answer.
_MAX_TAGS = 16


@dataclasses.dataclass(frozen=True)
class Verdict:
  """The answer of a completion.

  Attributes:
    answer: The answer in its canonical spelling: the text of the option, or the
      plain number or list. None if the completion gives no answer.
    how: The rule that found it: "tag", "json", "boxed", "bare", "bold", "cue",
      "letter", "statement" or "none".
    correct: True if the answer is the problem's.
    abstained: True if no rule can tell, because the problem has no answer to
      compare with or the comparison took too long; then `correct` is False.
  """

  answer: str | None
  how: str
  correct: bool
  abstained: bool = False


_NOTHING = Verdict(answer=None, how="none", correct=False)


def verify_all(
  completions: Sequence[str], problems: Sequence[records.Problem]
) -> list[Verdict]:
  """Judges each completion as `verify` does, many at a time.

  Args:
    completions: Any texts.
    problems: The problem of each completion.

  Returns:
    The verdicts in the order of the completions.
  """
  pairs = zip(completions, problems, strict=True)
  return [verify(completion, problem) for completion, problem in pairs]


def verify(completion: str, problem: records.Problem) -> Verdict:
  """Finds the answer of a completion and judges it.

  Text between <think> tags is ignored. In a completion with an <answer> tag the
  last tag alone counts, and only if no other tag has a different answer and no
  tag stays open.

  Args:
    completion: Any text, from "" to a megabyte of noise.
    problem: The question. Without a public answer no completion is correct.

  Returns:
    The verdict. Never raises, whatever the completion.
  """
  _, _, completion = completion.rpartition("</think>")
  if "<think>" in completion:  # The thinking was cut off.
    return dataclasses.replace(_NOTHING, abstained=not problem.is_checkable)
  if "<answer>" in completion:
    answer, how = _from_tags(completion, problem), "tag"
  else:
    answer, how = _from_free_text(_clip(completion), problem)
  unknown = not problem.is_checkable
  if answer is None:
    return dataclasses.replace(_NOTHING, abstained=unknown)
  correct = _is_right(answer, problem)
  return Verdict(answer=answer, how=how, correct=correct, abstained=unknown)


def _from_tags(completion: str, problem: records.Problem) -> str | None:
  """The answer of the last tag, if all tags with an answer agree."""
  end = len(completion)
  texts: list[str] = []
  while (start := completion.rfind("<answer>", 0, end)) >= 0:
    close = completion.find("</answer>", start, end)
    if close < 0 or len(texts) == _MAX_TAGS:
      return None
    texts.append(completion[start + len("<answer>") : close])
    end = start
  # A nested tag, or one closed twice.
  if completion.count("</answer>") != len(texts):
    return None
  last, *others = [_parse(text, problem) for text in dict.fromkeys(texts)]
  return last if not set(others) - {last, None} else None


def _clip(text: str) -> str:
  if len(text) <= _HEAD + _TAIL:
    return text
  return f"{text[:_HEAD]}\n{text[-_TAIL:]}"


def _is_right(answer: str, problem: records.Problem) -> bool:
  """True if a parsed answer is the problem's."""
  if not problem.is_checkable:
    return False
  if problem.question_type == "multi_choice":
    return answer.strip() == problem.answer.strip()
  if problem.answer_type == "list":
    return answer == _parse_list(problem.answer)
  right = numbers.only_number(problem.answer)
  if right is None:
    return False
  error = abs(decimal.Decimal(answer) - right)
  if problem.answer_type == "float" and problem.precision >= 0:
    # Rounds to the right answer, whichever way a half is rounded.
    return 2 * error <= decimal.Decimal(1).scaleb(-problem.precision)
  return error == 0


def _parse(text: str, problem: records.Problem) -> str | None:
  """The answer in a text that should contain nothing else."""
  if problem.question_type == "multi_choice":
    return options.parse_options(problem.choices).from_answer(text)
  if len(text) > _MAX_ANSWER:
    return None
  text = text.strip()
  if problem.answer_type == "list":
    return _parse_list(text)
  if _RE.ordinary_integer.fullmatch(text):
    return str(int(text))
  value = numbers.only_number(numbers.strip_lead_in(text))
  return None if value is None else numbers.canonical(value)


def _from_free_text(
  text: str, problem: records.Problem
) -> tuple[str | None, str]:
  """The answer in free text, and the rule that found it."""
  text = _RE.hint.sub("", text)
  odd = _RE.odd_tag.findall(text)
  if odd:
    return _parse(odd[-1], problem), "tag"
  fields = [match[match.lastgroup or 0] for match in _RE.field.finditer(text)]
  if fields:
    answers = {_parse(field, problem) for field in fields}
    return (answers.pop() if len(answers) == 1 else None), "json"
  boxed = _last_box(text)
  if boxed is not None:
    answer = _parse(boxed, problem)
    if answer is not None:
      return answer, "boxed"
  answer = _parse(text, problem)
  if answer is not None:
    return answer, "bare"
  bold = {
    _parse(part, problem)
    for line in text.split("\n")
    if "**" in line and phrases.is_assertion(line)
    for part in _RE.bold.findall(line)
  } - {None}
  if len(bold) == 1:
    return bold.pop(), "bold"
  text = free_text.without_listed_options(numbers.plain(text))
  if problem.answer_type == "list":
    return _from_last_list(text)
  if free_text.lists_numbers(text):
    return None, "none"
  if problem.question_type == "multi_choice":
    return free_text.find_option(text, options.parse_options(problem.choices))
  return free_text.find_number(text)


def _last_box(text: str) -> str | None:
  r"""The content of the last \boxed{...}, with balanced braces."""
  start = text.rfind(r"\boxed{")
  if start < 0 or _RE.other_box.search(text[max(0, start - 40) : start]):
    return None
  depth, start = 1, start + len(r"\boxed{")
  for i in range(start, min(len(text), start + _MAX_ANSWER)):
    depth += {"{": 1, "}": -1}.get(text[i], 0)
    if not depth:
      return text[start:i]
  return None


_NO_SPACE_OR_QUOTES = str.maketrans("", "", " \t\n\r'\"")


def _parse_list(text: str) -> str | None:
  """The canonical spelling of a list: "[1,2.5]"; None if it is no list."""
  text = numbers.strip_lead_in(text)
  bracketed = text[:1] == "["
  if text[:1] == "(" and text[-1:] == ")":
    text = text[1:-1]
  if not bracketed:
    text = f"[{text}]"
  if (
    not text.endswith("]")
    or len(text) < 3
    or text.count("[") != text.count("]")
  ):
    return None
  items = []
  for item in text[1:-1].split(","):
    core = item.strip(" \t\n'\"[]")
    value = numbers.only_number(core)
    if not core or (value is None and not bracketed):
      return None
    spelling = core.casefold() if value is None else numbers.canonical(value)
    items.append(item.replace(core, spelling).translate(_NO_SPACE_OR_QUOTES))
  return f"[{','.join(items)}]"


def _from_last_list(text: str) -> tuple[str | None, str]:
  found = _RE.bracketed.findall(text) or _RE.round.findall(text)
  answer = _parse_list(found[-1]) if found else None
  return (answer, "statement") if answer else (None, "none")
