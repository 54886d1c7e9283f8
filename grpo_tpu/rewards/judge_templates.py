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

_TABLE = tables.read("grpo_tpu.rewards", "judge_templates.toml")
NAMES = tuple(_TABLE)
_MAX_BYTES = 2**16
_PLACEHOLDER, _MARK = re.compile(r"\{([a-z_]+)\}"), re.compile(r"</?([\w-]+)>")
# Names of control tokens, and the mark that stands for a picture.
_CONTROL = {
  name.strip("<>")
  for name in (*GEMMA3.names.values(), *GEMMA3.image_names, records.IMAGE_MARK)
  if name.strip()
}


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
    """The text before the response, with the image marks of the question."""
    answer = problem.answer.replace(records.IMAGE_MARK, "")
    shown = {"question": records.plain_query(problem), "answer": answer}
    # In one pass, so that a question cannot bring placeholders.
    return _PLACEHOLDER.sub(lambda match: shown[match[1]], self.before)

  def visible(self, completion: str) -> str:
    """The part of a completion that is judged, without space around it.

    A completion that ends in its thinking has none. Marks of the template and
    names of control tokens lose their angle brackets, and control characters
    are question marks: a response can end neither itself nor the turn.
    """
    text = verify.without_thinking(completion) or ""
    marks = _CONTROL.union(_MARK.findall(self.before + self.after))
    names = "|".join(map(re.escape, sorted(marks)))
    mark = rf"<(\s*/?\s*(?:{names})\s*/?\s*)>"
    text = re.sub(mark, r"(\1)", text, flags=re.IGNORECASE)
    # Bytes that are no text would be three tokens each.
    text = text.replace("\N{REPLACEMENT CHARACTER}", "?")
    shown = (x if printable(x, keep="\n\t") == x else "?" for x in text)
    return "".join(shown).strip()


def open_template(name: str) -> Template:
  """The built-in template of this name, or that in a text file.

  Raises:
    ValueError: There is none, or its text breaks a rule.
  """
  setting, remedy = "rewards.judges: the template", "see docs/rewards.md"
  try:
    found = untrusted.read_bytes(name, _MAX_BYTES) if name not in NAMES else b""
    text = found.decode("utf-8-sig") or _TABLE[name]["text"]
  except (OSError, ValueError, KeyError) as error:
    rule = f"be {', '.join(NAMES)}, or a file of text in UTF-8"
    raise ValueError(f"{setting} ({name!r}) must {rule}: {error}") from error
  before, _, after = text.strip().partition("{response}")
  others = {*_PLACEHOLDER.findall(before)} - {"question", "answer"}
  others |= {*_PLACEHOLDER.findall(after)}
  rule = "have {question}, {answer}, both or none, then {response}, then a "
  rule += "question, and no more placeholders"
  require(bool(after.strip()) and not others, setting, name, rule, remedy)
  marks = sorted(_CONTROL.intersection(_MARK.findall(text.lower())))
  rule = f"leave out names of control tokens: {', '.join(marks)}"
  require(not marks, setting, name, rule, remedy)
  return Template(before, after)
