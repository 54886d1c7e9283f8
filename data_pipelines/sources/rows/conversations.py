"""Reads lists of messages, as LLaVA and chat formats have them."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_pipelines.records import IMAGE_MARK, BadRecord
from data_pipelines.sources.rows import gold
from data_pipelines.text import untrusted

_ROLE_KEYS = ("role", "from", "speaker")
_TEXT_KEYS = ("content", "value", "text")
_IMAGE_KEYS = ("image", "image_url", "url", "path", "bytes")
_TURNS = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {
  **dict.fromkeys(("user", "human", "question"), "user"),
  **dict.fromkeys(("assistant", "gpt", "model", "bot", "answer"), "assistant"),
  **dict.fromkeys(("system", "developer"), "system"),
}


class Conversation(NamedTuple):
  """A question and its reply; "" where there is no such text."""

  question: str
  reply: str
  system: str
  images: tuple[Any, ...]  # What messages hold, as values of a column.
  is_cut: bool  # True if later questions and replies are left out.


def messages(value: Any) -> list[Any] | None:
  """The messages of a value or of its JSON text; None if it has none."""
  value = gold.plain(value)
  if isinstance(value, str) and value.lstrip()[:2] in ("[{", '{"'):
    try:
      value = json.loads(value)
    except (ValueError, RecursionError):
      return None
  if isinstance(value, Mapping):
    value = [value]
  if not isinstance(value, list | tuple) or not value:
    return None
  for each in value:
    keys = each.keys() if isinstance(each, Mapping) else set()
    if not keys & set(_ROLE_KEYS) or not keys & set(_TEXT_KEYS):
      return None
  return list(value)


def read(found: list[Mapping[str, Any]], *, last: bool = False) -> Conversation:
  """The question and the reply of some messages.

  The first question that has a reply counts. Where the last message is a
  question, or `last` is True, what was said before is quoted in it.
  """
  images: list[list[Any]] = []
  turns = []
  for message in found:
    held: list[Any] = []
    role = next(message[key] for key in _ROLE_KEYS if key in message)
    known = _ROLES.get(str(role).casefold())
    if known is None:
      detail = f"a message has the role {untrusted.shorten(role)}; use one of "
      raise BadRecord("unknown_role", f"{detail}{', '.join(_ROLES)}")
    turns.append((known, _text(message, held)))
    images.append(held)
  system = "\n".join(text for role, text in turns if role == "system")
  users = [i for i, (role, _) in enumerate(turns) if role == "user"]
  if not users:
    detail = "the messages hold no question of a user; leave the record out"
    raise BadRecord("empty_question", detail)
  start = users[0]
  is_quoted = last or turns[-1][0] == "user"
  end = users[-1] + 1 if is_quoted else start + 1
  before = [turn for turn in turns[:end] if turn[0] != "system"]
  question = turns[start][1]
  if len(before) > 1:
    quoted = [f"{role.capitalize()}: {text}" for role, text in before]
    question = "\n".join(quoted)
  after = [text for role, text in turns[end:] if role == "assistant"]
  return Conversation(
    question=question,
    reply=after[0] if after else "",
    system=system,
    images=tuple(image for held in images[:end] for image in held),
    is_cut=not is_quoted and len(users) > 1,
  )


def read_reply(value: Any, column: str) -> tuple[str, Conversation | None]:
  """A reply, or "", and the conversation before it if the value holds that too.

  The value is a text, messages of which the last is the reply, or a text of
  turns that begin with "Human:" and "Assistant:".
  """
  if gold.is_missing(gold.plain(value)):
    return "", None
  if isinstance(value, str) and value.startswith("\n\nHuman:"):
    _, *parts = _TURNS.split(value)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    value = [{"role": role, "content": text.strip()} for role, text in pairs]
  if found := messages(value):
    before = read(found, last=True) if len(found) > 1 else None
    return _text(found[-1], []).strip(), before
  if not isinstance(value, str):
    shown = untrusted.shorten(value)
    detail = f"{column} holds {shown}; give a text or messages"
    raise BadRecord("bad_completions", detail)
  return value.strip(), None


def _text(message: Mapping[str, Any], images: list[Any]) -> str:
  """The text of a message, with a mark for each picture; adds its pictures."""
  given = (message[k] for k in _TEXT_KEYS if message.get(k) is not None)
  content = gold.plain(next(given, ""))
  if isinstance(content, str):
    return content
  parts = [content] if isinstance(content, Mapping) else content
  if not isinstance(parts, list | tuple):
    detail = f"a message holds a {type(content).__name__}; give a text or parts"
    raise BadRecord("not_text", detail)
  texts = []
  for part in parts:
    if isinstance(part, str):
      texts.append(part)
    elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
      texts.append(part["text"])
    elif isinstance(part, Mapping) and (
      "image" in str(part.get("type", "")) or "image" in part
    ):
      texts.append(IMAGE_MARK)
      held = (part.get(key) for key in _IMAGE_KEYS)
      images += [each for each in held if not gold.is_missing(each)][:1]
    else:
      detail = f"a part of a message is {untrusted.shorten(part)}"
      raise BadRecord("not_text", f"{detail}; give texts and images alone")
  return "\n".join(text for text in texts if text)
