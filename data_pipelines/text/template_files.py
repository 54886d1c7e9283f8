"""Jinja files that write the user's turn of a prompt.

A file sees the variables of one problem, and no other file. Its first renders
are in a worker process, where an endless loop can be ended. jinja2 is imported
where it is used, because the check of a command line does without.
"""

import dataclasses
import functools
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_pipelines import records
from data_pipelines.text import untrusted
from data_pipelines.validation import printable
from data_pipelines.workers import functions, pool

if TYPE_CHECKING:
  import jinja2

SUFFIX = ".jinja"
_MAX_BYTES = 2**20
_TIMEOUT_SECONDS, _MEMORY_GIB = 20.0, 1.0
_RENDER = "data_pipelines.text.template_files:render_all"
_ANSWER = re.compile(r"\{#-?\s*answer\s*:\s*(\w+)\s*-?#\}")
_CHAT_TOKENS = re.compile(
  "<bos>|<eos>|<(?:start|end)_of_turn>|<(?:start|end)_of_image>"
)
# What the text asks for tells how completions state the answer.
_ASKED = (
  ("<reasoning>", "reasoned"),
  ("<answer>", "tagged"),
  (r"\boxed", "boxed"),
)


@dataclasses.dataclass(frozen=True)
class TemplateFile:
  """The text of a jinja file, and the path to name in errors."""

  path: str
  source: str

  @property
  def answer_style(self) -> str:
    """The built-in template whose completions its prompts ask for."""
    if found := _ANSWER.search(self.source):
      return found[1]
    return next((name for text, name in _ASKED if text in self.source), "plain")

  @functools.cached_property
  def uses_examples(self) -> bool:
    """True if the template places the solved examples itself."""
    from jinja2 import nodes

    names = _environment().parse(self.source).find_all(nodes.Name)
    return any(name.name == "examples" for name in names)

  def render(self, variables: Mapping[str, Any]) -> str:
    """The text for one problem, without white space around it.

    Raises:
      BadRecord: The template fails for this problem, or writes too much.
    """
    try:
      text = _compile(self.path, self.source).render(variables).strip()
    except Exception as error:  # Filters raise nearly anything.
      raise records.BadRecord(
        "prompt_template", _reason(error, self.path)
      ) from (error)
    records.check_text(f"the text of {self.path}", text)
    return text

  def refuse(self, reason: str, remedy: str) -> ValueError:
    """The error for a file that cannot write prompts."""
    return ValueError(
      f"data.prompt_template ({self.path!r}) must be a jinja template of the "
      f"user's turn, but {printable(reason.rstrip('.'))}; {remedy}."
    )

  def try_out(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts for the first problems, rendered within time and memory.

    Args:
      rows: The variables of each problem, of values that JSON can hold.

    Raises:
      ValueError: The template is wrong, or fails for one of them.
    """
    workers = pool.Pool(
      (_RENDER,),
      num_workers=1,
      timeout_seconds=_TIMEOUT_SECONDS,
      memory_gib=_MEMORY_GIB,
    )
    try:
      found = workers.submit(_RENDER, self.path, self.source, rows).result()
    finally:
      workers.close()
    if isinstance(found, functions.Failure):
      remedy = "look for a loop that does not end or a text that only grows"
      raise self.refuse(f"rendering it failed: {found.reason}", remedy)
    if isinstance(found, str):
      names = ", ".join(rows[0]) if rows else "question"
      raise self.refuse(found, f"correct it; a template may use {names}")
    return found


def read(path: str) -> TemplateFile:
  """Reads a template without compiling it.

  Raises:
    ValueError: The file is missing, too large or no text, or its text holds the
      tokens of chat turns.
  """
  file = TemplateFile(path, "")
  try:
    source = untrusted.read_bytes(path, _MAX_BYTES).decode("utf-8-sig")
  except (OSError, ValueError) as error:
    remedy = "name a file of text in UTF-8"
    raise file.refuse(f"it cannot be read: {error}", remedy) from error
  if found := _CHAT_TOKENS.search(source):
    line = source.count("\n", 0, found.start()) + 1
    raise file.refuse(
      f"line {line} holds {found[0]}",
      "leave out the tokens of the chat, which the program adds, and write "
      "{{ image }} where a picture goes",
    )
  return TemplateFile(path, source)


def render_all(
  path: str, source: str, rows: Sequence[Mapping[str, Any]]
) -> list[str] | str:
  """The text for each row of variables, or why there is none; for a worker."""
  file = TemplateFile(path, source)
  try:
    return [file.render(row) for row in rows]
  except records.BadRecord as error:
    return error.detail


@functools.cache
def _environment() -> "jinja2.Environment":
  """Templates that reach no file, and render the same text every time."""
  import jinja2
  from jinja2 import sandbox

  environment = sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  del environment.globals["lipsum"], environment.filters["random"]
  return environment


@functools.lru_cache(maxsize=8)
def _compile(path: str, source: str) -> "jinja2.Template":
  import jinja2

  environment = _environment()
  code = environment.compile(source, path, path)
  variables = environment.make_globals(None)
  return jinja2.Template.from_code(environment, code, variables)


def _reason(error: Exception, path: str) -> str:
  """The line of the template where an error arose, and its message."""
  line = getattr(error, "lineno", None)
  if line is None:
    for frame, number in traceback.walk_tb(error.__traceback__):
      if frame.f_code.co_filename == path:
        line = number
  message = getattr(error, "message", None) or functions.one_line(error)
  return f"line {line}: {message}" if line else message
