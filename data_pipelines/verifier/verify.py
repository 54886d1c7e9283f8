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
import functools
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

from data_pipelines import records
from data_pipelines.text import tables
from data_pipelines.verifier import (
  comparisons,
  free_text,
  latex,
  numbers,
  options,
  phrases,
  written,
)

_RE = tables.patterns("verify")
_THINKING = tables.read("data_pipelines.verifier", "patterns.toml")["thinking"]
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


# A parser is slow on what it has not read before.
_TYPICAL = r"\frac{\sqrt{3}}{2} x^{2} + 2 \pi (x - 1) - \sin 2 x"
_NOTHING = Verdict(answer=None, how="none", correct=False)
_UNKNOWN = dataclasses.replace(_NOTHING, abstained=True)


def verify(
  completion: str, problem: records.Problem, *, truncated: bool = False
) -> Verdict:
  """Finds the answer of a completion and judges it.

  Text between <think> tags is ignored. In a completion with an <answer> tag the
  last tag alone counts, and only if no other tag has a different answer and no
  tag stays open.

  Args:
    completion: Any text, from "" to a megabyte of noise.
    problem: The question. Without a public answer no completion is correct.
    truncated: True if the completion was cut off at a limit of tokens; only a
      closed tag or box gives it an answer.

  Returns:
    The verdict, whatever the completion.

  Raises:
    RuntimeError: An expression needs a worker, and none can be started.
  """
  verdict = _start(completion, problem, truncated)
  return verdict if isinstance(verdict, Verdict) else verdict()


def verify_all(
  completions: Sequence[str],
  problems: Sequence[records.Problem],
  truncated: Sequence[bool] | None = None,
) -> list[Verdict]:
  """Judges each completion as `verify` does; expressions are compared together.

  The verdicts are in the order of the completions; `truncated` is True where
  one was cut off.

  Raises:
    RuntimeError: An expression needs a worker, and none can be started.
  """
  if truncated is None:
    truncated = [False] * len(completions)
  rows = zip(completions, problems, truncated, strict=True)
  started = [_start(*row) for row in rows]
  try:
    return [each if isinstance(each, Verdict) else each() for each in started]
  except (KeyboardInterrupt, SystemExit):
    comparisons.close()  # Else Ctrl-C would wait for what has been started.
    raise


def start_workers(problems: Sequence[records.Problem]) -> None:
  """Starts a worker if a problem will need one, which takes two seconds."""
  if any(problem.answer_type == "expression" for problem in problems):
    comparisons.start(comparisons.EXPRESSIONS, _TYPICAL, "x", 0.0)


def _start(
  completion: str, problem: records.Problem, truncated: bool
) -> Verdict | Callable[[], Verdict]:
  """The verdict, or a function that waits for it."""
  is_choice = problem.question_type == "multi_choice"
  kind = None if is_choice else _WRITTEN.get(problem.answer_type)
  if kind == problem.answer_type == "text":
    if found := written.yes_or_no(problem.answer):
      kind, (answer, choices) = None, found
      problem = dataclasses.replace(
        problem, question_type="multi_choice", choices=choices, answer=answer
      )
  if kind:
    read = functools.partial(written.clean, kind=kind)
    find = functools.partial(written.find, kind=kind)
  else:
    read = functools.partial(_read, problem=problem)
    find = functools.partial(_from_free_text, problem=problem)
  answer, how = _find(completion, read, find, truncated)
  if answer is None:
    return _NOTHING if problem.is_checkable else _UNKNOWN
  verdict = functools.partial(Verdict, answer=answer, how=how)
  if not problem.is_checkable:
    return verdict(correct=False, abstained=True)
  pending = _compare(answer, problem, kind)
  if isinstance(pending, bool):
    return verdict(correct=pending)

  def wait() -> Verdict:
    results = [comparisons.is_right(each) for each in pending]
    correct = True in results
    abstained = None in results and not correct
    return verdict(correct=correct, abstained=abstained)

  return wait


# How the answers of each type are written; `unchecked` ones as texts.
_WRITTEN = {x: x for x in ("text", "expression", "scored")}
_WRITTEN["unchecked"] = "text"


def _find(
  completion: str,
  parse: Callable[[str], str | None],
  from_free_text: Callable[[str], tuple[str | None, str]],
  truncated: bool,
) -> tuple[str | None, str]:
  """The answer in the tags, or else in the text, and the rule that found it."""
  visible = without_thinking(completion)
  if visible is None:
    return None, "none"
  completion = visible
  if "<answer>" in completion:
    return _from_tags(completion, parse), "tag"
  answer, how = from_free_text(_clip(completion))
  is_closed = how in ("tag", "boxed")
  return (None, "none") if truncated and not is_closed else (answer, how)


def without_thinking(completion: str) -> str | None:
  """The completion after its thinking; None if the thinking was cut off."""
  low = phrases.to_lower(completion)
  if not any(word in low for word in _THINKING["words"]):
    return completion
  closed = [low.rpartition(close) for _, close in _THINKING["marks"]]
  visible = min(
    (after for _, mark, after in closed if mark), key=len, default=low
  )
  if any(opening in visible for opening, _ in _THINKING["marks"]):
    return None
  return completion[len(completion) - len(visible) :]


def _golds(problem: records.Problem) -> list[str]:
  """The right answers of a problem, read as answers in tags are."""
  texts = (problem.answer, *problem.aliases)
  return [_clean(text, problem.answer_type) or text for text in texts]


_clean = functools.lru_cache(maxsize=4096)(written.clean)


def _compare(
  answer: str, problem: records.Problem, kind: str | None
) -> bool | list[futures.Future[Any]]:
  """Compares an answer, or starts to compare it in a worker."""
  if kind == "scored":
    scorer, _, task = str(problem.metadata.get("scorer", "")).partition(":")
    path = comparisons.SCORERS.get(scorer)
    if path is None:
      return False
    entry = problem.metadata.get("entry")
    return [comparisons.start(path, task, answer, entry)]
  if kind is None:
    golds = (problem.answer, *problem.aliases)
    return any(_equals(answer, gold, problem) for gold in golds)
  if kind == "text":
    return any(written.same_text(answer, gold) for gold in _golds(problem))
  pending = []
  for gold in _golds(problem):
    if latex.key(gold) == latex.key(answer):
      return True
    value, found = latex.number(gold), latex.number(answer)
    if value is not None and found is not None:
      if abs(found - value) <= problem.tolerance * abs(value):
        return True
    elif latex.is_readable(gold) and latex.is_readable(answer):
      if problem.unit and value is not None:
        gold = f"{gold}\\text{{{problem.unit}}}"
      arguments = gold, answer, problem.tolerance
      pending.append(comparisons.start(comparisons.EXPRESSIONS, *arguments))
  return pending or False


def _from_tags(
  completion: str, parse: Callable[[str], str | None]
) -> str | None:
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
  last, *others = [parse(text) for text in dict.fromkeys(texts)]
  return last if not set(others) - {last, None} else None


def _clip(text: str) -> str:
  is_short = len(text) <= _HEAD + _TAIL
  return text if is_short else f"{text[:_HEAD]}\n{text[-_TAIL:]}"


def _equals(answer: str, gold: str, problem: records.Problem) -> bool:
  """True if a parsed answer is this right one."""
  if problem.question_type == "multi_choice":
    return answer.strip() == gold.strip()
  # Relative to the right answer, as ChartQA's relaxed accuracy.
  tolerance = decimal.Decimal(str(problem.tolerance))
  if problem.answer_type == "list":
    right = _parse_list(gold) or ""
    if _RE.number.sub("0", answer) != _RE.number.sub("0", right):
      return False
    found, values = map(_RE.number.findall, (answer, right))
    pairs = zip(
      map(decimal.Decimal, found), map(decimal.Decimal, values), strict=True
    )
    return all(abs(one - two) <= tolerance * abs(two) for one, two in pairs)
  value = numbers.only_number(gold)
  if value is None:
    return False
  error = abs(decimal.Decimal(answer) - value)
  if problem.answer_type == "float" and problem.precision >= 0:
    # Rounds to the right answer, whichever way a half is rounded.
    if 2 * error <= decimal.Decimal(1).scaleb(-problem.precision):
      return True
  return error <= tolerance * abs(value)


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
  plain = numbers.strip_lead_in(text)
  value = numbers.only_number(plain)
  if value is None or numbers.has_other_unit(plain, value, problem.unit):
    return None
  return numbers.canonical(value)


def _read(text: str, problem: records.Problem) -> str | None:
  """The answer in a tag or a box, which may hold a sentence."""
  if answer := _parse(text, problem):
    return answer
  answer, how = _from_free_text(_clip(text), problem)
  is_loose = problem.choices and how in ("letter", "statement")
  return None if is_loose and not _RE.claim.search(_clip(text)) else answer


def _from_free_text(
  text: str, problem: records.Problem
) -> tuple[str | None, str]:
  """The answer in free text, and the rule that found it."""
  text = _RE.hint.sub("", text)
  odd = _RE.odd_tag.findall(text)
  if odd:
    answers = {_read(inside, problem) for _, inside in odd}
    return (answers.pop() if len(answers) == 1 else None), "tag"
  fields = written.fields(text)
  if fields:
    answers = {_parse(field, problem) for field in fields}
    return (answers.pop() if len(answers) == 1 else None), "json"
  boxes, end = written.last_boxes(text)
  if boxes:
    answer = _from_boxes(boxes, problem)
    later = _stated_after(text[end:], problem)
    # A box with no option is a step of the work.
    if later or answer or problem.question_type != "multi_choice":
      return later or (answer, "boxed")
  elif end:  # The last box is not closed.
    return None, "none"
  answer = _parse(text, problem)
  if answer is not None:
    return answer, "bare"
  bold = {_parse(part, problem) for part in written.bold_parts(text)} - {None}
  if len(bold) == 1:
    return bold.pop(), "bold"
  text = free_text.without_listed_options(numbers.plain(text))
  text = free_text.without_positions(text)
  if problem.answer_type == "list":
    return _from_last_list(text)
  if free_text.lists_numbers(text) or free_text.is_hedged(text):
    return None, "none"
  if problem.question_type == "multi_choice":
    return free_text.find_option(text, options.parse_options(problem.choices))
  answer, how = free_text.find_number(text)
  value = decimal.Decimal(answer or 0)
  has_other_unit = answer and numbers.has_other_unit(text, value, problem.unit)
  return (None, "none") if has_other_unit else (answer, how)


def _from_boxes(boxes: list[str], problem: records.Problem) -> str | None:
  """The answer in boxes side by side, which must agree or be one list."""
  if problem.answer_type == "list":
    boxes = [", ".join(boxes)]
  answers = {_read(box, problem) for box in boxes}
  return answers.pop() if len(answers) == 1 else None


def _stated_after(
  text: str, problem: records.Problem
) -> tuple[str | None, str] | None:
  """The answer that a text announces, if there is nothing else beside it."""
  parts = phrases.sentences(numbers.plain(text))
  for i in range(len(parts) - 1, -1, -1):
    after = phrases.text_after_cue(parts, i)
    if after and (answer := _parse(after.strip(" *:"), problem)):
      return answer, "cue"
  return None


_NO_SPACE_OR_QUOTES = str.maketrans("", "", " \t\n\r'\"")


def _parse_list(text: str) -> str | None:
  """The canonical spelling of a list: "[1,2.5]"; None if it is no list."""
  text = _RE.row_word.sub(", ", numbers.strip_lead_in(text).rstrip("."))
  bracketed = text[:1] == "["
  if text[:1] + text[-1:] in ("()", "{}"):
    text = text[1:-1]
  if not bracketed:
    text = f"[{text}]"
  is_closed = text.endswith("]") and text.count("[") == text.count("]")
  if not is_closed or len(text) < 3:
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
  """The last list in brackets, or the only row of numbers in the last line."""
  found = _RE.bracketed.findall(text) or _RE.round.findall(text)
  if not found and not phrases.is_refusal(text):
    found = _RE.row.findall("".join(phrases.sentences(text)[-1:]))
    found = found if len(found) == 1 else []
  answer = _parse_list(found[-1]) if found else None
  return (answer, "statement") if answer else (None, "none")
