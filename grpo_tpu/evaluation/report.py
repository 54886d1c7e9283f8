"""What an evaluation found, as a page to read: Markdown, and HTML on its own.

Pure: figures and examples in, strings out. The HTML holds its pictures and
styles and asks nothing of any network; whatever a model or a data set wrote is
escaped, and the page's own policy forbids every script besides.
"""

import base64
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from PIL import Image

# Pictures are shrunk to this many pixels a side; longer texts are cut.
_MAX_SIDE = 480
_MAX_TEXT = 4_000

_ABLATIONS = {
  "removed": "a plain grey picture in its place",
  "shuffled": "the picture of another problem",
}
_OUTCOMES = {
  "right": "right",
  "wrong": "wrong",
  "no answer": "no answer could be read",
  "cut off": "cut off before an answer",
  "not asked": "not asked: damaged, or too long",
}
# Beside an option, for those who do not see its colour.
_MARKS = {"right": " \u2713", "wrong": " \u2717", "given": " \u2190", "": ""}


@dataclasses.dataclass(frozen=True)
class Example:
  """One answer to look at.

  Attributes:
    record: In MathVista's results format.
    outcome: Right, wrong, or why there is none; a key of `scorecard.OUTCOMES`.
    num_samples: How many answers were sampled beside it.
    samples_right: How many of those are right.
    picture: From `picture_uri`, or "" without one.
  """

  record: Mapping[str, Any]
  outcome: str
  num_samples: int
  samples_right: int
  picture: str


def picture_uri(image: np.ndarray) -> str:
  """The picture, uint8 [height, width, 3], as a data URI of a PNG or JPEG."""
  small = Image.fromarray(image)
  small.thumbnail((_MAX_SIDE, _MAX_SIDE))
  found = []
  for kind, options in (("png", {}), ("jpeg", {"quality": 80})):
    file = io.BytesIO()
    small.save(file, kind, **options)
    found.append((len(file.getvalue()), kind, file.getvalue()))
  _, kind, data = min(found)
  return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def line(scores: Mapping[str, Any]) -> str:
  """The result in one line."""
  if not scores["accuracy"]:
    return f"{scores['split']}: {scores['note']}"
  return f"{scores['split']}: greedy accuracy {_figure(scores['accuracy'])}"


def markdown(
  scores: Mapping[str, Any],
  worst: Sequence[Mapping[str, Any]],
  examples: Sequence[Example],
) -> str:
  """The report as Markdown, without pictures.

  Args:
    scores: As in `eval/scores.json`.
    worst: The slices to name first.
    examples: Answers to show.
  """
  return _MARKDOWN.render(_view(scores, worst, examples))


def html(
  scores: Mapping[str, Any],
  worst: Sequence[Mapping[str, Any]],
  examples: Sequence[Example],
) -> str:
  """The report as one HTML page; arguments as for `markdown`."""
  return _HTML.render(_view(scores, worst, examples))


def _view(scores, worst, examples) -> dict[str, Any]:
  """What both pages show, in the order in which they show it."""
  rows = []
  if scores["accuracy"]:
    rows.append(("Greedy", "", scores["accuracy"]))
    rows += [
      (f"Picture {name}", _ABLATIONS[name], found["accuracy"])
      for name, found in scores["ablations"].items()
    ]
    if sampled := scores.get("sampled"):
      rows.append(
        ("One sample", f"mean of {sampled['num_samples']}", sampled["accuracy"])
      )
      for name, note, figures in (
        ("pass", "at least one is right", sampled["pass_at_k"]),
        ("maj", "the commonest answer is right", sampled["maj_at_k"]),
      ):
        # With one sample both are its accuracy.
        rows += [
          (f"{name}@{k}", note, x) for k, x in figures.items() if k != "1"
        ]
  slices: dict[str, list[Mapping[str, Any]]] = {}
  for row in scores.get("slices", ()):
    slices.setdefault(row["dimension"], []).append(row)
  return {
    "scores": scores,
    "rows": rows,
    "worst": worst,
    "slices": slices,
    "outcomes": _OUTCOMES,
    "marks": _MARKS,
    "examples": [_shown(example) for example in examples],
  }


def _shown(example: Example) -> dict[str, Any]:
  record = example.record
  choices = record["choices"] or ()
  response = record["response"]
  rest = len(response) - _MAX_TEXT
  return {
    "pid": record["pid"],
    "question": record["question"],
    "unit": record["unit"],
    "choices": [
      {
        "text": f"({chr(65 + place)}) {text}",
        "mark": _mark(text, record),
      }
      for place, text in enumerate(choices)
    ],
    "expected": record["answer"],
    "is_graded": record["true_false"] is not None,
    "got": record["extraction"],
    "response": response[:_MAX_TEXT]
    + (f"\n[... {rest} more characters]" if rest > 0 else ""),
    "outcome": example.outcome,
    "reason": _OUTCOMES[example.outcome],
    "tags": [
      str(value)
      for value in (
        record["answer_type"],
        *(record["metadata"].get(x) for x in ("task", "context", "source")),
      )
      if value
    ],
    "num_samples": example.num_samples,
    "samples_right": example.samples_right,
    "picture": example.picture,
  }


def _mark(text: str, record: Mapping[str, Any]) -> str:
  """What an option is: the right one, the one given, or neither."""
  if record["answer"] and text == record["answer"]:
    return "right"
  if text == record["extraction"]:
    return "given" if record["true_false"] is None else "wrong"
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
  """A text as one cell of a Markdown table, with no mark-up of its own."""
  plain = " ".join(str(text).split())
  return re.sub(r"([\\`*\[\]<>|&~])", r"\\\1", plain)


def _as_code(text: Any) -> str:
  """A text as an indented block, which no text can end."""
  lines = str(text).splitlines() or [""]
  return "\n".join(f"    {row}" for row in lines)


_FILTERS = {
  "cell": _as_cell,
  "code": _as_code,
  "figure": _figure,
  "interval": _interval,
  "p_value": _p_value,
  "percent": _percent,
  "points": _points,
}


def _template(text: str, *, autoescape: bool) -> jinja2.Template:
  environment = jinja2.Environment(
    autoescape=autoescape,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
  )
  environment.filters |= _FILTERS
  return environment.from_string(text)


_MARKDOWN = _template(
  """\
# {{ scores.split | cell }}: {{ scores.model | cell }}

{% if scores.accuracy %}
**Greedy accuracy {{ scores.accuracy | figure }}.** Guessing among the
options alone would give {{ scores.chance | percent }}.
{% else %}
{{ scores.note }}
{% endif %}

Weights `{{ scores.weights | cell }}`; {{ scores.problems }} of
{{ scores.split_size }} problems, {{ scores.asked }} asked,
{{ scores.graded }} graded.
{% if scores.accuracy %}
Intervals are Wilson's, 95 %.

## Overall

| | % right | 95 % | |
|:--|--:|:-:|:--|
{% for name, note, x in rows %}
| {{ name }} | {{ x.share | percent }} | {{ x | interval }} | {{ note }} |
{% endfor %}

| Answers | |
|:--|--:|
{% for name, count in scores.outcomes.items() %}
| {{ outcomes[name] }} | {{ count }} |
{% endfor %}
{% for name, x in scores.ablations.items() %}
{% if loop.first %}

## Does it look?

The prompt stays as it is, image tokens included; only the picture changes.

{% endif %}
- Picture {{ name }}: {{ x.difference | points }} points for the real picture;
  {{ x.only_first }} problems right with it alone, {{ x.only_second }} without
  it alone ({{ x.p_value | p_value }}).
{% endfor %}

## Worst slices

{% for x in worst %}
{% if loop.first %}
| | | problems | % right | 95 % |
|:--|:--|--:|--:|:-:|
{% endif %}
| {{ x.dimension }} | {{ x.name | cell }} | {{ x.problems }} | \
{{ x.share | percent }} | {{ x | interval }} |
{% else %}
None is surely worse than the whole.
{% endfor %}

## All slices
{% for dimension, found in slices.items() %}

| {{ dimension }} | problems | % right | 95 % |
|:--|--:|--:|:-:|
{% for x in found %}
| {{ x.name | cell }} | {{ x.problems }} | {{ x.share | percent }} | \
{{ x | interval }} |
{% endfor %}
{% endfor %}
{% endif %}

## {{ "Failures" if scores.accuracy else "Answers" }}

Their pictures are in `report.html`.
{% for x in examples %}

### {{ x.pid | cell }}

{{ x.tags | join(", ") | cell }}

{{ x.question | code }}
{% for choice in x.choices %}
{{ choice.text | code }}
{% endfor %}
{% if x.is_graded %}

Expected:

{{ x.expected | code }}
{% endif %}

Got{{ " (" ~ x.reason ~ ")" if x.is_graded }}:

{{ (x.got or "nothing") | code }}

Written:

{{ x.response | code }}
{% if x.num_samples and x.is_graded %}

{{ x.samples_right }} of {{ x.num_samples }} samples are right.
{% endif %}
{% else %}

None.
{% endfor %}
""",
  autoescape=False,
)


_HTML = _template(
  """\
{% macro bar(x, overall) %}
<svg class="bar" viewBox="0 0 200 14" role="img"
 aria-label="{{ x.share | percent }}, {{ x | interval }}">
<line x1="0" x2="200" y1="7" y2="7" class="track"/>
<line x1="{{ 200 * overall }}" x2="{{ 200 * overall }}" y1="0" y2="14"
 class="overall"/>
<line x1="{{ 200 * x.low }}" x2="{{ 200 * x.high }}" y1="7" y2="7"
 class="interval"/>
<circle cx="{{ 200 * x.share }}" cy="7" r="3.5"/>
</svg>
{% endmacro %}
{% macro cells(x, overall) %}
<td class="number">{{ x.share | percent }}</td>
<td class="number faint">{{ x | interval }}</td>
<td class="bars">{{ bar(x, overall) }}</td>
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ scores.split }}: {{ scores.model }}</title>
<style>
:root {
  color-scheme: light dark;
  --paper: light-dark(#f6f6f3, #16181b);
  --card: light-dark(#ffffff, #1f2226);
  --ink: light-dark(#1d2126, #e6e7e8);
  --faint: light-dark(#6b7280, #9aa1ab);
  --edge: light-dark(#e2e2dc, #33373d);
  --blue: light-dark(#2459b3, #7aa7f0);
  --good: light-dark(#1b7f4b, #5cc98f);
  --bad: light-dark(#b3372a, #f08a7d);
}
* { box-sizing: border-box }
body {
  margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.5rem 4rem;
  background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.6rem; margin: 0 }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem }
h3 { font-size: .95rem; margin: 0 }
p { margin: .4rem 0 }
.faint { color: var(--faint) }
.card {
  background: var(--card); border: 1px solid var(--edge);
  border-radius: 10px; padding: 1.1rem 1.3rem;
}
.tiles { display: grid; gap: 1rem; margin: 1.6rem 0;
  grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)) }
.tiles strong { display: block; font-size: 2rem; line-height: 1.25;
  font-variant-numeric: tabular-nums }
table { border-collapse: collapse; width: 100% }
th { color: var(--faint); font-size: .85rem; font-weight: 500;
  text-align: left }
td, th { padding: .3rem .6rem; border-bottom: 1px solid var(--edge) }
tr:last-child td { border-bottom: 0 }
.bars { width: 230px }
.number { text-align: right; white-space: nowrap; width: 8rem;
  font-variant-numeric: tabular-nums }
.bar { display: block; width: 200px; height: 14px; overflow: visible }
.track { stroke: var(--edge); stroke-width: 2 }
.overall { stroke: var(--faint); stroke-dasharray: 2 2 }
.interval { stroke: var(--blue); stroke-width: 3; stroke-linecap: round;
  opacity: .55 }
.bar circle { fill: var(--blue) }
details.card { margin: .7rem 0 }
summary { cursor: pointer; font-weight: 600 }
.example { display: grid; gap: 1.4rem; margin: 1rem 0;
  grid-template-columns: minmax(0, 17rem) minmax(0, 1fr) }
.example img { max-width: 100%; min-width: 8rem; border-radius: 6px;
  border: 1px solid var(--edge); background: white }
.tag { display: inline-block; border: 1px solid var(--edge);
  border-radius: 99px; padding: 0 .6rem; margin: .2rem .2rem 0 0;
  font-size: .8rem; color: var(--faint) }
.reason { float: right; color: var(--bad); font-size: .85rem }
.right { color: var(--good) }
.wrong { color: var(--bad) }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
ul.options { list-style: none; margin: .4rem 0; padding: 0 }
dl { display: grid; grid-template-columns: 6rem minmax(0, 1fr);
  gap: .15rem .8rem; margin: .8rem 0 }
dt { color: var(--faint) }
dd { margin: 0; font-weight: 600 }
pre { margin: .6rem 0 0; padding: .7rem .9rem; max-height: 16rem;
  overflow: auto; border-radius: 6px; background: var(--paper);
  font: 13px/1.45 ui-monospace, monospace }
@media (max-width: 40rem) { .example { grid-template-columns: 1fr } }
</style>
</head>
<body>
<h1>{{ scores.split }}</h1>
<p class="faint">{{ scores.model }}, weights {{ scores.weights }}.
{{ scores.problems }} of {{ scores.split_size }} problems,
{{ scores.asked }} asked, {{ scores.graded }} graded.</p>
{% if not scores.accuracy %}
<p class="card">{{ scores.note }}</p>
{% else %}
{% set overall = scores.accuracy.share %}
<div class="tiles">
<div class="card"><span class="faint">Greedy accuracy</span>
<strong>{{ overall | percent }}</strong>
<span class="faint">{{ scores.accuracy | interval }}</span></div>
{% for name, x in scores.ablations.items() %}
<div class="card"><span class="faint">Picture {{ name }}</span>
<strong>{{ x.accuracy.share | percent }}</strong>
<span class="faint">{{ x.accuracy | interval }}</span></div>
{% endfor %}
<div class="card"><span class="faint">Guessing the option</span>
<strong>{{ scores.chance | percent }}</strong>
<span class="faint">on average, all problems</span></div>
</div>

<h2>Overall</h2>
<div class="card"><table>
<tr><th></th><th></th><th class="number">right</th>
<th class="number">95 %</th><th></th></tr>
{% for name, note, x in rows %}
<tr><td>{{ name }}</td><td class="faint">{{ note }}</td>
{{ cells(x, overall) }}</tr>
{% endfor %}
</table>
<p class="faint">Intervals are Wilson's, 95 %; the dashed line is the greedy
accuracy.</p></div>

<h2>What became of the problems</h2>
<div class="card"><table>
{% for name, count in scores.outcomes.items() %}
<tr><td>{{ outcomes[name] }}</td><td class="number">{{ count }}</td>
<td class="number faint">{{ (count / scores.graded) | percent }}</td></tr>
{% endfor %}
</table></div>

{% for name, x in scores.ablations.items() %}
{% if loop.first %}
<h2>Does it look?</h2>
<div class="card">
<p class="faint">The prompt stays as it is, image tokens included; only the
picture changes. A policy that reads the picture loses by it.</p>
{% endif %}
<p>Picture {{ name }}: <b>{{ x.difference | points }} points</b> for the real
picture; {{ x.only_first }} problems right with it alone, {{ x.only_second }}
without it alone <span class="faint">({{ x.p_value | p_value }})</span>.</p>
{% if loop.last %}
</div>
{% endif %}
{% endfor %}

<h2>Worst slices</h2>
<div class="card">
{% if worst %}
<table>
<tr><th></th><th></th><th class="number">problems</th>
<th class="number">right</th><th class="number">95 %</th><th></th></tr>
{% for x in worst %}
<tr><td class="faint">{{ x.dimension }}</td><td>{{ x.name }}</td>
<td class="number">{{ x.problems }}</td>{{ cells(x, overall) }}</tr>
{% endfor %}
</table>
{% else %}
<p>None is surely worse than the whole.</p>
{% endif %}
</div>

<h2>All slices</h2>
{% for dimension, found in slices.items() %}
<details class="card"{{ " open" if loop.first }}>
<summary>{{ dimension }} <span class="faint">{{ found | length }}</span>
</summary>
<table>
<tr><th></th><th class="number">problems</th><th class="number">right</th>
<th class="number">95 %</th><th></th></tr>
{% for x in found %}
<tr><td>{{ x.name }}</td><td class="number">{{ x.problems }}</td>
{{ cells(x, overall) }}</tr>
{% endfor %}
</table></details>
{% endfor %}
{% endif %}

<h2>{{ "Failures" if scores.accuracy else "Answers" }}</h2>
{% for x in examples %}
<article class="card example">
<div>{% if x.picture %}<img src="{{ x.picture }}" alt="">{% else %}
<p class="faint">no picture can be shown</p>{% endif %}</div>
<div>
<span class="reason">{{ x.reason if x.is_graded }}</span>
<h3>{{ x.pid }}</h3>
<p class="text">{{ x.question }}
{{- " (in " ~ x.unit ~ ")" if x.unit }}</p>
{% if x.choices %}
<ul class="options">
{% for choice in x.choices %}
<li class="{{ choice.mark }}">
{{- choice.text }}
{{- marks[choice.mark] }}</li>
{% endfor %}
</ul>
{% endif %}
<dl>
{% if x.is_graded %}
<dt>expected</dt><dd class="text right">{{ x.expected }}</dd>
{% endif %}
<dt>got</dt>
<dd class="text {{ "wrong" if x.is_graded }}">
{{- "nothing" if x.got is none else x.got }}</dd>
{% if x.num_samples and x.is_graded %}
<dt>samples</dt><dd>{{ x.samples_right }} of {{ x.num_samples }} right</dd>
{% endif %}
</dl>
{% for tag in x.tags %}<span class="tag">{{ tag }}</span>{% endfor %}
<pre class="text">{{ x.response }}</pre>
</div>
</article>
{% else %}
<p class="card">None.</p>
{% endfor %}
</body>
</html>
""",
  autoescape=True,
)
