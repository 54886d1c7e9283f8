"""Jinja files that write the user's turn of a prompt.

A file sees the variables of one problem, and no other file. It first runs in a
worker process, where an endless loop can be ended. jinja2 is imported late,
because the check of a command line does without.
"""

import contextlib
import dataclasses
import functools
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from data_pipelines import records
from data_pipelines.text import untrusted
from data_pipelines.validation import printable
from data_pipelines.workers import functions, pool

SUFFIX = ".jinja"
_MAX_BYTES = 2**20
_TIMEOUT_SECONDS, _MEMORY_GIB = 20.0, 1.0
_RENDER = "data_pipelines.text.template_files:render_all"
_CHAT_TOKENS = re.compile(r"<(bos|eos|(start|end)_of_(turn|image))>")
# The built-in template that asks for the answer in the same way.
_STYLES = {"<reasoning>": "reasoned", "<answer>": "tagged", r"\boxed": "boxed"}


@dataclasses.dataclass(frozen=True)
class TemplateFile:
  """The text of a jinja file, and the path to name in errors."""

  path: str
  source: str

  @property
  def style(self) -> str:
    """The built-in template with the completions that its text asks for."""
    asked = (name for text, name in _STYLES.items() if text in self.source)
    return next(asked, "plain")

  @functools.cached_property
  def uses_examples(self) -> bool:
    """True if the template places the solved examples itself."""
    from jinja2 import nodes

    names = _environment().parse(self.source).find_all(nodes.Name)
    return any(name.name == "examples" for name in names)

  def render(self, variables: Mapping[str, Any]) -> str:
    """The text for one problem, without white space around it."""
    try:
      text = _compile(self.path, self.source).render(variables).strip()
    except Exception as error:  # Filters raise nearly anything.
      lines = [getattr(error, "lineno", None)]  # Of a syntax error.
      for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == self.path:
          lines.append(line)
      reason = getattr(error, "message", None) or functions.one_line(error)
      reason = f"line {lines[-1]}: {reason}" if lines[-1] else reason
      raise records.BadRecord("prompt_template", reason) from error
    records.check_text("the text", text)
    return text

  def try_out(self, rows: Sequence[Mapping[str, Any]]) -> None:
    """Renders the first problems, from variables, within time and memory."""
    workers = pool.Pool(
      (_RENDER,),
      num_workers=1,
      timeout_seconds=_TIMEOUT_SECONDS,
      memory_gib=_MEMORY_GIB,
    )
    with contextlib.closing(workers):
      found = workers.submit(_RENDER, self.path, self.source, rows).result()
    if isinstance(found, functions.Failure):
      raise self._refusal(found.reason, "bound its loops and its text")
    if isinstance(found, str):
      names = ", ".join(rows[0] if rows else ())
      raise self._refusal(found, f"a template may use {names}")
    for text, row in zip(found, rows, strict=True):
      marks, count = text.count(records.IMAGE_MARK), row["num_images"]
      if marks not in (0, count):
        reason = f"it writes {marks} image marks where there are {count} images"
        raise self._refusal(reason, "write {{ images }}, which always fits")
    if rows and not any(map(_shows_question, found, rows)):
      does = "leaves out the question" if any(found) else "writes no text"
      remedy = "write {{ question }} or {{ query }} in it"
      raise self._refusal(f"it {does}", remedy)
    if found:
      shown = untrusted.shorten(found[0], 1000)
      logging.info("The first prompt of %s: %s", self.path, shown)

  def _refusal(self, reason: str, remedy: str) -> ValueError:
    return ValueError(
      f"data.prompt_template ({self.path!r}) must be a jinja template of the "
      f"user's turn, but {printable(reason.rstrip('.: '))}; {remedy}."
    )


def read(path: str) -> TemplateFile:
  """Reads a template without compiling it; refuses the tokens of chat turns."""
  file = TemplateFile(path, "")
  try:
    source = untrusted.read_bytes(path, _MAX_BYTES).decode("utf-8-sig")
  except (OSError, ValueError) as error:
    remedy = "name a file of text in UTF-8"
    raise file._refusal(f"it cannot be read: {error}", remedy) from error
  if found := _CHAT_TOKENS.search(source):
    line = source.count("\n", 0, found.start()) + 1
    remedy = "leave out the chat's tokens, which the program adds"
    raise file._refusal(f"line {line} has {found[0]}", remedy)
  return TemplateFile(path, source)


def render_all(
  path: str, source: str, rows: Sequence[Mapping[str, Any]]
) -> list[str] | str:
  """The text for each row of variables, or why there is none; for a worker."""
  try:
    return [TemplateFile(path, source).render(row) for row in rows]
  except records.BadRecord as error:
    return error.detail


@functools.cache
def _environment() -> Any:
  """Templates that reach no file, and render the same text every time."""
  import jinja2
  from jinja2 import sandbox

  environment = sandbox.ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  )
  del environment.globals["lipsum"], environment.filters["random"]
  return environment


@functools.lru_cache(maxsize=8)
def _compile(path: str, source: str) -> Any:
  environment = _environment()
  code = environment.compile(source, path, path)
  variables = environment.make_globals(None)
  return environment.template_class.from_code(environment, code, variables)


def _shows_question(text: str, row: Mapping[str, Any]) -> bool:
  """True if the text has the letters and digits of the question."""
  question = row["question"].replace(records.IMAGE_MARK, "")
  asked, shown = (re.sub(r"[\W_]+", "", x).casefold() for x in (question, text))
  return asked in shown
