"""Labels the responses of results files, for `data.preference_file`.

The verifier labels each response 1.0 or 0.0. Problems without both labels are
left out.
"""

import itertools
import json
import os
from collections.abc import Iterable, Sequence

from absl import logging

from data_pipelines import records
from data_pipelines.scoring import results
from data_pipelines.sources import mixtures
from data_pipelines.text.untrusted import shorten
from data_pipelines.validation import SettingError, user_errors
from data_pipelines.verifier import verify

# Of what is written, and of what is left out.
_COUNTS = (
  *("groups", "completions"),
  *("without_right", "without_wrong", "without_answer"),
  *("not_in_data_dir", "empty", "repeated", "unusable"),
)


def label_results(
  paths: Sequence[str | os.PathLike[str]],
  out: str | os.PathLike[str],
  *,
  data_dir: str | os.PathLike[str] = "",
) -> dict[str, int]:
  """Writes one group of labelled completions per line; returns what it counted.

  A group starts with the right and the wrong completion that are closest in
  length, then the next closest two, and so on; those without a partner follow.
  The problems come from `data_dir`, or else from the first record of each.
  """
  counts = dict.fromkeys(_COUNTS, 0)
  texts, problems, first_fault = _read_responses(paths, counts)
  if data_dir:
    with user_errors():
      problems = mixtures.problems_by_pid(data_dir, texts)
  lines = []
  for pid, responses in texts.items():
    reason, group = _group(problems.get(pid), responses)
    counts[reason or "groups"] += 1
    if reason:
      continue
    counts["completions"] += len(group)
    row = {"pid": pid, "completions": [each._asdict() for each in group]}
    lines.append(json.dumps(row, ensure_ascii=False) + "\n")
  if not lines:
    raise SettingError(
      f"the results ({', '.join(map(str, paths))}) must hold a right and a "
      f"wrong response to some problem, but hold none: {counts}{first_fault}; "
      "add the results of another model."
    )
  results.write("out", out, "".join(lines))
  return counts


def _read_responses(
  paths: Iterable[str | os.PathLike[str]], counts: dict[str, int]
) -> tuple[dict[str, list[str]], dict[str, records.Problem], str]:
  """Reads the different responses to each problem, and the problems, by pid.

  The last value describes the first record that cannot be used, if any.
  """
  texts: dict[str, list[str]] = {}
  problems: dict[str, records.Problem] = {}
  first_fault = ""
  for path in paths:
    for pid, row in results.read_rows(path):
      try:
        with records.all_faults():
          problem = records.from_result({**row, "pid": pid})
          text = results.response_of(row) or ""
          records.check_text("response", text)
          records.check_text("pid", pid)
      except records.BadRecord as error:
        counts["unusable"] += 1
        where = f"pid {shorten(pid)} of {os.path.basename(path)}"
        first_fault = first_fault or f"; the first unusable: {where}, {error}"
        continue
      problems.setdefault(pid, problem)
      responses = texts.setdefault(pid, [])
      if not text.strip():
        counts["empty"] += 1
      elif text in responses:
        counts["repeated"] += 1
      else:
        responses.append(text)
  if first_fault:
    count = counts["unusable"]
    logging.warning("%d records are left out%s", count, first_fault)
  return texts, problems, first_fault


def _group(
  problem: records.Problem | None, texts: Sequence[str]
) -> tuple[str, list[records.LabelledCompletion]]:
  """Labels the responses to a problem, or names the reason against a group."""
  if problem is None:
    return "not_in_data_dir", []
  if not problem.is_checkable:
    return "without_answer", []
  right, wrong = [], []
  verdicts = verify.verify_all(texts, [problem] * len(texts))
  for text, verdict in zip(texts, verdicts, strict=True):
    if not verdict.abstained:
      (right if verdict.correct else wrong).append(text)
  if not right or not wrong:
    return "without_wrong" if right else "without_right", []
  pairs = []
  both = itertools.product(right, wrong)
  for better, worse in sorted(both, key=lambda x: abs(len(x[0]) - len(x[1]))):
    if better in right and worse in wrong:
      right.remove(better)
      wrong.remove(worse)
      pairs += [(better, 1.0), (worse, 0.0)]
  pairs += [(text, 1.0) for text in right] + [(text, 0.0) for text in wrong]
  return "", [records.LabelledCompletion(*pair) for pair in pairs]
