"""The report shows every figure and never runs the text that it shows."""

import html.parser
import io

import PIL.Image

from data_pipelines.scoring.pages import image_uri
from grpo_tpu.evaluation import report
from grpo_tpu.evaluation import scores as figures

EVIL = (
  "<script>alert(1)</script></pre></style><img src=x onerror=alert(1)>"
  '"\' onload="x" {{ 7 * 7 }} | `a` **b** [c](javascript:alert(1))\n\n'
  "    # head\r\n```\u2028<script>"
)
_FILE = io.BytesIO()
PIL.Image.new("RGB", (4, 3), "grey").save(_FILE, "png")
PNG = _FILE.getvalue()
IMAGE = image_uri(PNG)


def record(**changes):
  return {
    "pid": "17",
    "question": "How many?",
    "unit": None,
    "choices": None,
    "precision": None,
    "answer": "3",
    "question_type": "free_form",
    "answer_type": "integer",
    "metadata": {"task": "counting", "source": "drawn"},
    "response": "I see <answer>4</answer>",
    "strict_answer": "4",
    "strict_true_false": False,
  } | changes


def example(images=(PNG,), num_samples=0, samples_right=0, **changes):
  return report.Example(
    record=record(**changes),
    outcome="wrong",
    num_samples=num_samples,
    samples_right=samples_right,
    images=images,
  )


def scores(split="testmini", model="tiny", **changes):
  answers = [
    figures.GradedCompletion(
      i, record(strict_true_false=i < 3, **changes), True, True
    )
    for i in range(8)
  ]
  return {
    "set": "",
    "split": split,
    "model": model,
    "weights": "run:x@6",
    "split_size": 5141,
    "parts": (),
    **figures.compute(
      answers,
      samples=[answers] * 4,
      ks=(1, 4),
      ablated={"removed": answers[::-1]},
    ),
  }


class Page(html.parser.HTMLParser):
  """The tags of a page, and its text outside of the style."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.text = [], ""
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_data(self, data):
    self.text += data


def pages(found, worst=(), examples=()):
  return (
    report.render("report.md", found, worst, examples),
    Page(report.render("report.html", found, worst, examples)),
  )


EVERYWHERE = {
  "set": "",
  "split": EVIL,
  "model": EVIL,
  "pid": EVIL,
  "question": EVIL,
  "unit": EVIL,
  "choices": [EVIL, "3"],
  "answer": EVIL,
  "response": EVIL,
  "strict_answer": EVIL,
  "metadata": {"task": EVIL, "source": EVIL, "skills": [EVIL]},
}


def evil_page(examples):
  found = scores(
    EVIL,
    EVIL,
    metadata=EVERYWHERE["metadata"],
  ) | {"weights": EVIL}
  changes = {
    k: EVERYWHERE[k] for k in EVERYWHERE if k not in ("split", "model")
  }
  shown = [example(**changes)] * examples
  return pages(found, found["slices"], shown)


def test_foreign_text_is_escaped_in_the_page():
  _, page = evil_page(1)
  _, tame = pages(scores(), (), [example()])
  assert "script" not in {tag for tag, _ in page.tags}
  assert {tag for tag, _ in page.tags} <= {tag for tag, _ in tame.tags} | {
    *("ul", "li"),
  }
  for tag, attributes in page.tags:
    assert not [name for name in attributes if name.startswith("on")]
    assert not {"href", "style", "srcdoc"} & set(attributes), tag
    assert attributes.get("src", IMAGE) == IMAGE
  # Once in each place, letter by letter, and evaluated in none.
  assert page.text.count("<script>alert(1)</script>") > 10
  assert "49" not in page.text


def test_control_characters_are_visible_on_both_pages():
  controls = "\x1b\x07\x85\u202e\u2066\ud800"
  evil = f"3{controls}4"
  found = scores(evil, evil, metadata={"source": evil}) | {"weights": evil}
  shown = example(
    **{k: evil for k in ("pid", "question", "answer", "response", "unit")},
    choices=[evil],
    metadata={"source": evil},
  )
  for name in ("report.md", "report.html"):
    page = report.render(name, found, found["slices"], [shown])
    assert not set(page) & set(controls)
    assert page.count(r"3\x1b\x07") >= 7 and r"\u202e\u2066\ud800" in page


def test_the_page_is_titled_by_what_was_evaluated():
  _, page = pages(scores("testmini", "tiny"))
  assert page.text.count("Evaluation of tiny on testmini") == 2


def test_the_page_forbids_scripts_and_loads_nothing():
  _, page = pages(scores(), (), [example()])
  policies = [
    attributes["content"]
    for tag, attributes in page.tags
    if tag == "meta" and attributes.get("http-equiv")
  ]
  assert policies == [
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
  ]
  assert "http" not in report.render(
    "report.html", scores(), (), [example()]
  ).replace("http-equiv", "")


def test_in_markdown_foreign_text_is_code_or_escaped():
  text, _ = evil_page(2)
  for row in text.splitlines():
    if row.startswith("    "):
      continue  # An indented block, where nothing has a meaning.
    assert "<script" not in row.replace("\\<", "")
    assert "](javascript" not in row.replace("\\]", "")
  # A row of a table has the columns of its head, whatever is in its cells.
  rows = text.replace("\\|", "").splitlines()
  for above, row in zip(rows, rows[1:], strict=False):
    if above.startswith("|") and row.startswith("|"):
      assert row.count("|") == above.count("|")
  # Before each block there is an empty line, or it would be a paragraph's.
  for above, row in zip(rows, rows[1:], strict=False):
    if row.startswith("    "):
      assert above.startswith("    ") or not above.strip()


def test_every_figure_is_on_both_pages():
  found = scores()
  for text in (pages(found)[0], pages(found)[1].text):
    for figure in (
      found["accuracy"],
      found["ablations"]["removed"]["accuracy"],
      found["sampled"]["pass_at_k"]["4"],
      found["sampled"]["maj_at_k"]["4"],
      *found["slices"],
    ):
      assert f"{100 * figure['share']:.1f} %" in text
      assert f"{100 * figure['low']:.1f} to {100 * figure['high']:.1f}" in text
    for words in ("pass@4", "maj@4", "Image removed", "plain grey", "drawn"):
      assert words in text
    assert "8 of 5141 problems" in " ".join(text.split())
    assert "+0.0 points" in text and "p = 1.000" in text


def test_an_example_shows_what_was_asked_expected_and_got():
  shown = example(
    choices=["2", "3", "4"], unit="cm", num_samples=8, samples_right=5
  )
  text, page = pages(scores(), (), [shown])
  for words in ("How many?", "(B) 3", "counting", "wrong", "I see <answer>4"):
    assert words in text and words in page.text
  assert "(B) 3 \u2713" in page.text and "(C) 4 \u2717" in page.text
  assert "(A) 2 " not in page.text and "in cm" in page.text
  assert "5 of 8 right" in page.text and "5 of 8 samples are right" in text
  _, page = pages(scores(), (), [example(strict_answer=None, images=())])
  assert "nothing" in page.text and "no image" in page.text
  two = [example(images=(PNG,) * 2)]
  assert report.render("report.html", scores(), (), two).count(IMAGE) == 2
  assert "img" not in {tag for tag, _ in page.tags}


def test_an_ungraded_answer_is_called_neither_right_nor_wrong():
  shown = example(
    *((PNG,), 8, 0),
    choices=["2", "4"],
    answer="",
    strict_true_false=None,
  )
  found = {
    **{"set": "", "split": "test", "model": "tiny", "weights": "random:0"},
    "split_size": 5141,
    "parts": (),
    **{"problems": 1, "asked": 1, "graded": 0, "accuracy": None, "note": "No."},
  }
  text, page = pages(found, (), [shown])
  for words in (text, page.text.split("Answers")[1]):
    assert "(B) 4" in words and "drawn" in words
    for word in ("right", "wrong", "xpected", "\u2713", "\u2717", "%"):
      assert word not in words
  assert "(B) 4 \u2190" in page.text
  assert not {"right", "wrong"} & {
    name
    for _, attributes in page.tags
    for name in (attributes.get("class") or "").split()
  }


def test_worst_slices_come_as_they_are_given():
  found = scores()
  given = [
    dict(found["slices"][0], name=name) for name in ("zebra", "aardvark")
  ]
  for text in (pages(found, given)[0], pages(found, given)[1].text):
    assert (
      0
      < text.index("zebra")
      < text.index("aardvark")
      < text.index("All slices")
    )
  for text in (pages(found)[0], pages(found)[1].text):
    assert "No slice is significantly worse" in text


def test_a_long_completion_is_cut_and_the_cut_is_marked():
  text = report.render(
    "report.html", scores(), (), [example(response="x" * 10_000)]
  )
  assert "xx\n[... 6000 more characters]" in text
  assert text.count("x" * 4_000) == 1 and "x" * 4_001 not in text


def test_one_line_gives_the_result():
  assert report.line(scores()) == (
    "testmini: greedy accuracy 37.5 % (13.7 to 69.4; 8 problems)"
  )
  hidden = {"set": "geo", "split": "test", "accuracy": None, "note": "No."}
  assert report.line(hidden) == "geo test: No."
