"""Pages for people, rendered from templates.

An HTML page embeds its images and styles and loads nothing from a network. Text
from models and data sets is escaped, and control characters in it are visible.
The page's content security policy forbids scripts.
"""

import base64
import functools
import io
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import markupsafe
from PIL import Image

from data_pipelines import images
from data_pipelines.validation import printable

_PACKAGE = "data_pipelines.scoring"
# Pixels of an image's longer side, and characters of a completion.
_MAX_SIDE = 480
_MAX_TEXT = 4_000


def render(template: str, *, package: str = _PACKAGE, **values: Any) -> str:
  """Renders a template of a package, or of this one, as text.

  A template may extend or import this package's `page.html.j2`.
  """
  return _environment(package).get_template(template).render(**values)


def image_uri(encoded: bytes) -> str:
  """Encodes an image as a small PNG or JPEG data URI; "" for a damaged one."""
  try:
    small = Image.fromarray(images.decode(encoded))
  except (ValueError, OSError):
    return ""
  small.thumbnail((_MAX_SIDE, _MAX_SIDE))
  uris = []
  for kind in ("png", "jpeg"):
    file = io.BytesIO()
    small.save(file, kind, quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    uris.append(f"data:image/{kind};base64,{data}")
  return min(uris, key=len)


def figure(share: Mapping[str, Any]) -> str:
  """A `statistics.share` with its interval, in words."""
  return (
    f"{100 * share['share']:.1f} % ({_interval(share)}; "
    f"{share['problems']} problems)"
  )


@functools.cache
def _environment(package: str) -> jinja2.Environment:
  environment = jinja2.Environment(
    loader=jinja2.ChoiceLoader(
      [jinja2.PackageLoader(package), jinja2.PackageLoader(_PACKAGE)]
    ),
    autoescape=jinja2.select_autoescape(["html.j2"]),
    finalize=_as_text,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  environment.filters |= {
    "cell": _as_cell,
    "clip": _clip,
    "code": _as_code,
    "figure": figure,
    "image_uri": image_uri,
    "interval": _interval,
    "name": lambda text: printable(str(text)),
    "p_value": lambda x: "p < 0.001" if x < 0.001 else f"p = {x:.3f}",
    "percent": lambda x: f"{100 * x:.1f} %",
    "points": lambda x: f"{100 * x:+.1f}".replace("-", "\N{MINUS SIGN}"),
  }
  return environment


def _interval(share: Mapping[str, Any]) -> str:
  return f"{100 * share['low']:.1f} to {100 * share['high']:.1f}"


def _clip(text: str) -> str:
  """The text; the rest of a long one is counted."""
  rest = len(text) - _MAX_TEXT
  more = f"\n[... {rest} more characters]" if rest > 0 else ""
  return text[:_MAX_TEXT] + more


def _as_cell(text: Any) -> str:
  """Escapes a text for one cell of a Markdown table."""
  return re.sub(r"([\\`*\[\]<>|&~])", r"\\\1", " ".join(str(text).split()))


def _as_code(text: Any) -> str:
  """Formats a text as an indented code block, which no text can end."""
  return "\n".join(f"    {row}" for row in str(text).splitlines() or [""])


def _as_text(value: Any) -> Any:
  """The value with its control characters visible, if it is a text."""
  is_text = isinstance(value, str) and not isinstance(value, markupsafe.Markup)
  return printable(value, keep="\n\t") if is_text else value
