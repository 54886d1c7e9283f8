"""Templates of the question that a judge is asked about a response.

The response comes after the question and the reference answer, so that a prompt
is read once for all of its completions. Knows no tokens and no network.
"""

import dataclasses
import hashlib
import re

from data_pipelines import records
from data_pipelines.text import tables, untrusted
from data_pipelines.text.chat_format import GEMMA3
from data_pipelines.validation import printable, require
from data_pipelines.verifier import verify

NAMES = tuple(tables.read("grpo_tpu.rewards", "judge_templates.toml"))
_MAX_BYTES = 2**16
_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_MARK = re.compile(r"</?([\w-]+)>")
# Names of control tokens, and the mark that stands for a picture.
_CONTROL = {
  name.strip("<>")
  for name in (*GEMMA3.names.values(), *GEMMA3.image_names, records.IMAGE_MARK)
} - {"\n", "\n\n"}


@dataclasses.dataclass(frozen=True)
class Template:
  """The text around a response."""

  before: str  # With {question} and {answer}, or with one, or without.
  after: str

  @property
  def needs_answer(self) -> bool:
    """True if only problems with an answer can be judged."""
    return "{answer}" in self.before

  @property
  def fingerprint(self) -> str:
    """SHA-256 of the text."""
    text = f"{self.before}{{response}}{self.after}"
    return hashlib.sha256(text.encode()).hexdigest()

  def prompt(self, problem: records.Problem) -> str:
    """The text before the response, with an image mark per picture or none."""
    answer = problem.answer.replace(records.IMAGE_MARK, "")
    shown = {"question": records.plain_query(problem), "answer": answer}
    # In one pass, so that a question cannot bring placeholders.
    return _PLACEHOLDER.sub(lambda match: shown[match[1]], self.before)

  def visible(self, completion: str) -> str:
    """The part of a completion that is judged, without space around it.

    The thinking is left out, and with it a completion that was cut off while
    it thought. Marks of the template and names of control tokens lose their
    angle brackets, and control characters are escaped: a response can end
    neither itself nor the turn.
    """
    text = verify.without_thinking(completion) or ""
    marks = {x.lower() for x in _MARK.findall(self.before + self.after)}
    names = "|".join(map(re.escape, sorted(marks | _CONTROL)))
    pattern = rf"<(\s*/?\s*(?:{names})\s*/?\s*)>"
    text = re.sub(pattern, r"(\1)", text, flags=re.IGNORECASE)
    # Bytes that are no text would be three tokens each.
    text = text.replace("\N{REPLACEMENT CHARACTER}", "?")
    return printable(text, keep="\n\t").strip()


def open_template(name: str) -> Template:
  """The built-in template of this name, or that in a text file.

  Raises:
    ValueError: There is none, or its text breaks a rule.
  """
  table = tables.read("grpo_tpu.rewards", "judge_templates.toml")
  text = table[name]["text"] if name in table else _read(name)
  found = _PLACEHOLDER.findall(text)
  unknown = sorted({*found} - {"question", "answer", "response"})
  is_last = found.count("response") == 1 and found[-1] == "response"
  marks = sorted({*_MARK.findall(text.lower())} & _CONTROL)
  _require(
    not unknown, name, f"use no placeholder {{{unknown and unknown[0]}}}"
  )
  _require(is_last, name, "have {response} once, after {question} and {answer}")
  _require(not marks, name, f"leave out <{marks and marks[0]}>")
  before, _, after = text.strip().partition("{response}")
  _require(bool(after.strip()), name, "ask a question after {response}")
  return Template(before, after)


def _read(path: str) -> str:
  try:
    return untrusted.read_bytes(path, _MAX_BYTES).decode("utf-8-sig")
  except (OSError, ValueError) as error:
    rule = f"be {', '.join(NAMES)}, or a file of text in UTF-8"
    _require(False, path, f"{rule}: {printable(str(error))}")
    raise


def _require(holds: bool, name: str, rule: str) -> None:
  remedy = "see docs/rewards.md"
  require(holds, "rewards.judges: the template", name, rule, remedy)
