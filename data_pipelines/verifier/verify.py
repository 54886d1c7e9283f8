"""Which answer a response gives, and whether it is right, by rules alone.

The order of the rules is an order of explicitness: a tag, a box, nothing but
an answer, a sentence that announces one, and only then what a plain sentence
says. Whatever is not clearly one answer is none: an unread right answer costs
a policy little, a paid wrong one teaches it. Every rule is linear in the
response. Knows nothing of rewards, formats asked for or other responses.

References:
  MathVista's own scoring: https://arxiv.org/abs/2310.02255
"""

import dataclasses
import decimal
import re

from data_pipelines import records
from data_pipelines.verifier import free_text, numbers, options, phrases

# Of a longer response the first and the last characters are read.
_HEAD, _TAIL = 1_000, 3_000
# No answer is longer; a tag that holds an essay holds none.
_MAX_ANSWER = 400
# More tags than this are noise.
_MAX_TAGS = 16
_ORDINARY_INTEGER = re.compile(r"-?\d{1,18}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a response answers.

  Attributes:
    answer: The answer in one spelling: the text of the option, or the number
      or list written plainly. None if the response gives no answer.
    how: Which rule read it: "tag", "json", "boxed", "bare", "bold", "cue",
      "letter", "statement" or "none".
    correct: Whether the answer is the problem's.
  """

  answer: str | None
  how: str
  correct: bool


_NOTHING = Verdict(answer=None, how="none", correct=False)


def final_answer(problem: records.Problem) -> str:
  """How the right answer is written inside the tag: an option by its text."""
  return problem.answer


def verify(response: str, problem: records.Problem) -> Verdict:
  """The answer that `response` gives to `problem`, and whether it is right.

  What a model thinks between <think> tags answers nothing. A response with an
  <answer> tag is judged by its last tag alone, and only if no other tag holds
  a different answer and none stays open.

  Args:
    response: What a model wrote, from nothing at all to a megabyte of noise.
    problem: The question. Without a public answer nothing is correct.

  Returns:
    The verdict; no response raises.
  """
  response = response[response.rfind("</think>") + 1 :].removeprefix("/think>")
  if "<think>" in response:  # Cut off while it thought.
    return _NOTHING
  if "<answer>" in response:
    answer, how = _tagged(response, problem), "tag"
  else:
    answer, how = _search(_clipped(response), problem)
  if answer is None:
    return _NOTHING
  return Verdict(answer=answer, how=how, correct=_equal(answer, problem))


def _tagged(response: str, problem: records.Problem) -> str | None:
  """The answer that all readable tags agree on, the last among them."""
  end = len(response)
  texts: list[str] = []
  while (start := response.rfind("<answer>", 0, end)) >= 0:
    close = response.find("</answer>", start, end)
    if close < 0 or len(texts) == _MAX_TAGS:
      return None
    texts.append(response[start + len("<answer>") : close])
    end = start
  # A tag within a tag, or one closed twice.
  if response.count("</answer>") != len(texts):
    return None
  last, *others = [_read(text, problem) for text in dict.fromkeys(texts)]
  return last if not set(others) - {last, None} else None


def _clipped(response: str) -> str:
  if len(response) <= _HEAD + _TAIL:
    return response
  return f"{response[:_HEAD]}\n{response[-_TAIL:]}"


def _equal(answer: str, problem: records.Problem) -> bool:
  """Whether a read answer is the problem's."""
  if not problem.has_answer:
    return False
  if problem.question_type == "multi_choice":
    return answer.strip() == problem.answer.strip()
  if problem.answer_type == "list":
    return answer == _list(problem.answer)
  gold = numbers.only_number(problem.answer)
  if gold is None:
    return False
  error = abs(decimal.Decimal(answer) - gold)
  if problem.answer_type == "float" and problem.precision >= 0:
    # Rounds to the gold, whichever way a half goes.
    return 2 * error <= decimal.Decimal(1).scaleb(-problem.precision)
  return error == 0


def _read(text: str, problem: records.Problem) -> str | None:
  """The answer in a text that should hold nothing else."""
  if problem.question_type == "multi_choice":
    return options.options_of(problem.choices).only(text)
  if len(text) > _MAX_ANSWER:
    return None
  text = text.strip()
  if problem.answer_type == "list":
    return _list(text)
  if _ORDINARY_INTEGER.fullmatch(text):
    return str(int(text))
  value = numbers.only_number(numbers.undressed(text))
  return None if value is None else numbers.canonical(value)


def _search(response: str, problem: records.Problem) -> tuple[str | None, str]:
  """The answer in free text, and the rule that found it."""
  response = _HINT.sub("", response)
  odd = _ODD_TAG.findall(response)
  if odd:
    return _read(odd[-1], problem), "tag"
  fields = [match[match.lastgroup or 0] for match in _FIELD.finditer(response)]
  if fields:
    answers = {_read(field, problem) for field in fields}
    return (answers.pop() if len(answers) == 1 else None), "json"
  boxed = _boxed(response)
  if boxed is not None:
    answer = _read(boxed, problem)
    if answer is not None:
      return answer, "boxed"
  answer = _read(response, problem)
  if answer is not None:
    return answer, "bare"
  bold = {
    _read(part, problem)
    for line in response.split("\n")
    if "**" in line and phrases.is_assertion(line)
    for part in _BOLD.findall(line)
  } - {None}
  if len(bold) == 1:
    return bold.pop(), "bold"
  text = free_text.without_listed_options(numbers.plain(response))
  if problem.answer_type == "list":
    return _last_list(text)
  if free_text.lists_numbers(text):
    return None, "none"
  if problem.question_type == "multi_choice":
    return free_text.choice(text, options.options_of(problem.choices))
  return free_text.quantity(text)


# The official prompts, repeated.
_HINT = re.compile(r"Hint: Please answer[^\n]{0,300}")
_ODD_TAG = re.compile(
  r"<answer>([^<>]{0,400})</answer>",
  re.IGNORECASE,
)
_FIELD = re.compile(
  r"""["'](?:final[_ ]?|correct[_ ]?)?answer\d?["']\s{0,9}:\s{0,9}(?:"""
  r""""(?P<double>[^"\n]{0,400})"|'(?P<single>[^'\n]{0,400})'"""
  r"""|(?P<list>\[[^\[\]]{0,400}\])|(?P<value>[^,}\n"'\[]{1,100}))""",
  re.IGNORECASE,
)
_BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*")


_OTHER_BOX = re.compile(r"\}\s?\$?\s?(?:or|and|,|/)\s?\$?\s?\Z")


def _boxed(response: str) -> str | None:
  r"""What the last \boxed{...} holds, braces balanced."""
  start = response.rfind(r"\boxed{")
  if start < 0 or _OTHER_BOX.search(response[max(0, start - 40) : start]):
    return None
  depth, start = 1, start + len(r"\boxed{")
  for i in range(start, min(len(response), start + _MAX_ANSWER)):
    depth += {"{": 1, "}": -1}.get(response[i], 0)
    if not depth:
      return response[start:i]
  return None


# Lists.

_BRACKETED = re.compile(
  r"\[[^\[\]]{0,300}(?:\[[^\[\]]{0,100}\][^\[\]]{0,100})*\]"
)


def _list(text: str) -> str | None:
  """A list in one spelling: "[1, 2.50]" is "[1,2.5]"; None if it is none."""
  text = numbers.undressed(text)
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
    spelt = core.casefold() if value is None else numbers.canonical(value)
    items.append(
      item.replace(core, spelt).translate(dict.fromkeys(map(ord, " \t\n\r'\"")))
    )
  return f"[{','.join(items)}]"


_ROUND = re.compile(r"\((?:[^(),]{1,30},){1,20}[^(),]{1,30}\)")


def _last_list(text: str) -> tuple[str | None, str]:
  found = _BRACKETED.findall(text) or _ROUND.findall(text)
  answer = _list(found[-1]) if found else None
  return (answer, "statement") if answer else (None, "none")
