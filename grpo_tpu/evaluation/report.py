"""The report of an evaluation, as a Markdown page and as an HTML page.

Pure: takes figures and examples, returns strings. The HTML page embeds its
images and styles and loads nothing from a network. Text from models and data
sets is escaped, and control characters in it are visible. The page's content
security policy forbids scripts.
"""

import base64
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import markupsafe
import numpy as np
from PIL import Image

from data_pipelines.validation import printable

# Pixels of an image's longer side, and characters of a completion.
_MAX_SIDE = 480
_MAX_TEXT = 4_000

_ABLATIONS = {
  "removed": "a plain grey image instead",
  "shuffled": "the image of another problem",
}
_OUTCOMES = {
  "right": "right",
  "wrong": "wrong",
  "no answer": "no answer found",
  "cut off": "truncated before an answer",
  "not asked": "not asked: damaged, or too long",
}


@dataclasses.dataclass(frozen=True)
class Example:
  """One answer to show."""

  record: Mapping[str, Any]  # In MathVista's results format.
  outcome: str  # One of `scores.OUTCOMES`.
  num_samples: int  # The number of sampled answers to the same problem.
  samples_right: int
  images: tuple[str, ...]  # From `image_uri`.


def image_uri(image: np.ndarray) -> str:
  """Encodes an image, uint8 [height, width, 3], as a PNG or JPEG data URI."""
  small = Image.fromarray(image)
  small.thumbnail((_MAX_SIDE, _MAX_SIDE))
  encoded = []
  for kind, options in (("png", {}), ("jpeg", {"quality": 80})):
    file = io.BytesIO()
    small.save(file, kind, **options)
    encoded.append((len(file.getvalue()), kind, file.getvalue()))
  _, kind, data = min(encoded)
  return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def line(scores: Mapping[str, Any]) -> str:
  """The greedy accuracy in one line."""
  if not scores["accuracy"]:
    return f"{scores['split']}: {scores['note']}"
  return f"{scores['split']}: greedy accuracy {_figure(scores['accuracy'])}"


def render(
  name: str,
  scores: Mapping[str, Any],
  worst: Sequence[Mapping[str, Any]],
  examples: Sequence[Example],
) -> str:
  """Renders "report.md", which has no images, or "report.html".

  `scores` are the contents of `eval/scores.json`, `worst` the slices to list
  first.
  """
  slices: dict[str, list[Mapping[str, Any]]] = {}
  for row in scores.get("slices", ()):
    slices.setdefault(row["dimension"], []).append(row)
  return _PAGES.get_template(f"{name}.j2").render(
    scores=scores,
    rows=_overall_rows(scores) if scores["accuracy"] else [],
    worst=worst,
    slices=slices,
    outcomes=_OUTCOMES,
    examples=[_example_view(example) for example in examples],
  )


def _overall_rows(
  scores: Mapping[str, Any],
) -> list[tuple[str, str, Mapping[str, Any]]]:
  """The name, note and figure of each row of the first table."""
  rows = [("Greedy", "", scores["accuracy"])]
  rows += [
    (f"Image {name}", _ABLATIONS[name], ablation["accuracy"])
    for name, ablation in scores["ablations"].items()
  ]
  if sampled := scores.get("sampled"):
    note = f"mean of {sampled['num_samples']}"
    rows.append(("One sample", note, sampled["accuracy"]))
    for name, note, figures in (
      ("pass", "at least one is right", sampled["pass_at_k"]),
      ("maj", "the most frequent answer is right", sampled["maj_at_k"]),
    ):
      # For k = 1 both equal the accuracy of one sample.
      rows += [(f"{name}@{k}", note, x) for k, x in figures.items() if k != "1"]
  return rows


def _example_view(example: Example) -> dict[str, Any]:
  """The values of an example that the templates show."""
  record = example.record
  response = record["response"]
  if (rest := len(response) - _MAX_TEXT) > 0:
    response = f"{response[:_MAX_TEXT]}\n[... {rest} more characters]"
  tags = [record["answer_type"]] + [
    record["metadata"].get(name) for name in ("task", "context", "source")
  ]
  return {
    **record,
    "choices": [
      {"text": f"({chr(65 + index)}) {text}", "mark": _mark(text, record)}
      for index, text in enumerate(record["choices"] or ())
    ],
    "is_graded": record["strict_true_false"] is not None,
    "response": response,
    "reason": _OUTCOMES[example.outcome],
    "tags": [str(tag) for tag in tags if tag],
    "num_samples": example.num_samples,
    "samples_right": example.samples_right,
    "images": example.images,
  }


def _mark(text: str, record: Mapping[str, Any]) -> str:
  """The CSS class of an option."""
  if record["answer"] and text == record["answer"]:
    return "right"
  if text == record["strict_answer"]:
    return "given" if record["strict_true_false"] is None else "wrong"
  return ""


def _percent(share: float) -> str:
  return f"{100 * share:.1f} %"


def _points(share: float) -> str:
  return f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")


def _interval(figure: Mapping[str, Any]) -> str:
  return f"{100 * figure['low']:.1f} to {100 * figure['high']:.1f}"


def _figure(figure: Mapping[str, Any]) -> str:
  return (
    f"{_percent(figure['share'])} ({_interval(figure)}; "
    f"{figure['problems']} problems)"
  )


def _p_value(value: float) -> str:
  return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def _as_cell(text: Any) -> str:
  """Escapes a text for one cell of a Markdown table."""
  plain = " ".join(str(text).split())
  return re.sub(r"([\\`*\[\]<>|&~])", r"\\\1", plain)


def _as_code(text: Any) -> str:
  """Formats a text as an indented code block, which no text can end."""
  lines = str(text).splitlines() or [""]
  return "\n".join(f"    {row}" for row in lines)


def _as_text(value: Any) -> Any:
  """The value with its control characters visible, if it is a text."""
  is_text = isinstance(value, str) and not isinstance(value, markupsafe.Markup)
  return printable(value, keep="\n\t") if is_text else value


_PAGES = jinja2.Environment(
  loader=jinja2.PackageLoader("grpo_tpu.evaluation"),
  autoescape=jinja2.select_autoescape(["html.j2"]),
  finalize=_as_text,
  undefined=jinja2.StrictUndefined,
  trim_blocks=True,
  lstrip_blocks=True,
  keep_trailing_newline=True,
)
_PAGES.filters |= {
  "cell": _as_cell,
  "code": _as_code,
  "figure": _figure,
  "interval": _interval,
  "p_value": _p_value,
  "percent": _percent,
  "points": _points,
}
