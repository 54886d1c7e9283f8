"""Compares results files of the same problems, which our rules judge.

For the tests see `statistics.paired_comparison`.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from etils import epath

from data_pipelines import records
from data_pipelines.scoring import (
  ablations,
  figures,
  grading,
  pages,
  results,
  statistics,
)
from data_pipelines.sources import mixtures
from data_pipelines.storage import objects
from data_pipelines.storage.paths import is_remote, to_path
from data_pipelines.text.untrusted import shorten
from data_pipelines.validation import SettingError, user_errors

# Problems in each list of changes on the page.
_MAX_EXAMPLES = 100
# The fields of a problem, besides the question, that decide a verdict.
_RULES = ("answer", "aliases", "unit", "precision", "tolerance")
_RESULTS = re.compile(
  r"eval/(?P<set>[^/]+/)?output_(.*_)?(?P<kind>[^/_]*)\.json"
)
_CHANGES = {"right_to_wrong": -1, "wrong_to_right": 1}

Files = list[epath.Path]  # The results files of one side, one per run.


def compare_files(
  before: str,
  after: str,
  *,
  by: Sequence[str] = (),
  data_dir: str = "",
  report: str = "",
  scores: str = "",
) -> str:
  """Compares results files, writes the figures, and returns them as text.

  Args:
    before: A results file or a workdir, or several with commas between them. Of
      workdirs with several results files, those of equal names are compared.
    after: The same for the other side.
    by: Columns of the problems' metadata whose values make slices; also
      `question_type` and `answer_type`.
    data_dir: Data dir with the problems and their images, if not the files.
    report: File for a page of what changed, if any.
    scores: File for the figures as JSON, if any; see `_compare`.

  Raises:
    SettingError: The files cannot be compared, or an output cannot be written.
  """
  pairs = _find_pairs(before, after)
  outputs = [name for name in (report, scores) if name]
  for side in (files for pair in pairs for files in pair):
    results.check_different([*side, *outputs])
  compared = [_compare(x, y, by, data_dir) for x, y in pairs]
  if report:
    page = pages.render("comparison.html.j2", comparisons=compared)
    results.write("report", report, page)
  tables = [table for table, _ in compared]
  if scores:
    results.write_json("scores", scores, {"comparisons": tables})
  return "\n".join(pages.render("comparison.txt.j2", x=x) for x in tables)


def _find_pairs(before: str, after: str) -> list[list[Files]]:
  """The results files to compare."""
  with user_errors():
    sides = list[list[dict[str, epath.Path]]]()
    for name, value in (("BEFORE", before), ("AFTER", after)):
      is_one = objects.exists(to_path(name, value), what=name)
      named = [value] if is_one else value.split(",")
      sides.append([_results_files(name, x) for x in named])
  everyone = [*sides[0], *sides[1]]
  if all(len(x) == 1 for x in everyone):
    return [[[y for x in side for y in x.values()] for side in sides]]
  names = [x for x in everyone[0] if all(x in each for each in everyone)]
  if not names:
    listed = ", ".join(str(file) for x in everyone for file in x.values())
    raise SettingError(
      f"BEFORE ({before!r}) and AFTER ({after!r}) must have results files of "
      f"the same name, but have {listed}; name one file of each."
    )
  return [[[x[name] for x in side] for side in sides] for name in names]


def _results_files(side: str, value: str) -> dict[str, epath.Path]:
  """A results file, or those of a workdir by their names."""
  path = to_path(side, value)
  if is_remote(path):
    names = list(objects.list_objects(path, what=side))
  else:
    files = (
      pathlib.Path(path).glob("eval/**/*.json") if path.is_dir() else [path]
    )
    names = [x.relative_to(path).as_posix() for x in files]
  if names in ([""], ["."]):
    return {"": path}
  # The run's own set comes first.
  found = {
    name: path / name
    for name in sorted(names, key=lambda name: (name.count("/"), name))
    if (match := _RESULTS.fullmatch(name))
    and match["set"] != "samples/"
    and match["kind"] not in ablations.KINDS
  }
  if not found:
    raise SettingError(
      f"{side} ({value!r}) must be a results file, or a workdir with "
      "eval/output_SPLIT.json, but has none; run --mode=evaluate with this "
      "--workdir first."
    )
  return found


def _compare(
  before: Files, after: Files, by: Sequence[str], data_dir: str
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
  """Compares two sides.

  Returns:
    A JSON object, and the first problems of each direction of change, with the
    result and the verdict of each run. The object has the values of `_figures`;
    for `before` and `after` the `files`, in which `left_out` are the pids that
    another file lacks, and the `statistics.spread` of their shares;
    `no_answer`, the number of problems without a public answer; and `slices`,
    with numbers in place of pids, and `p_holm`, corrected for their number.
  """
  files = [*before, *after]
  found = [{x.problem.pid: x for x in results.read(file)} for file in files]
  shared = _same_problems(files, found, data_dir)
  judged = [[replace(run[x.pid], problem=x) for x in shared] for run in found]
  judged = [[x for x in run if x.counts] for run in judged]
  if not judged[0]:
    raise results.error_in(
      files[0], "have public answers, but has none", "compare another split"
    )
  verdicts = [grading.verdicts(run) for run in judged]
  is_right = np.array([[x.correct for x in run] for run in verdicts])
  problems, pids = [x.problem for x in judged[0]], {x.pid for x in shared}
  runs = [
    {
      "file": str(files[i]),
      "left_out": [pid for pid in found[i] if pid not in pids],
      "no_response": sum(x.response is None for x in judged[i]),
      **statistics.share(int(row.sum()), row.size),
    }
    for i, row in enumerate(is_right)
  ]
  count, pairs = len(before), list(zip(judged, verdicts, strict=True))
  table, examples = _figures(is_right, count), {}
  for name in _CHANGES:
    examples[name] = [
      (problems[i], [(x[i], y[i]) for x, y in pairs])
      for i in table[name][:_MAX_EXAMPLES]
    ]
    table[name] = [problems[i].pid for i in table[name]]
  for name, side in (("before", runs[:count]), ("after", runs[count:])):
    spread = statistics.spread([x["share"] for x in side])
    table[name] = {"files": side} | spread
  table["no_answer"] = len(shared) - len(problems)
  rows: list[dict[str, Any]] = [
    {"dimension": column, "name": name} | _figures(is_right[:, indices], count)
    for column in dict.fromkeys(by)
    for name, indices in _slices(problems, column).items()
  ]
  table["slices"] = rows
  corrected = statistics.holm([row["p_value"] for row in rows])
  for row, p_value in zip(rows, corrected, strict=True):
    row |= {name: len(row[name]) for name in _CHANGES} | {"p_holm": p_value}
  return table, examples


def _figures(is_right: np.ndarray, count: int) -> dict[str, Any]:
  """Compares runs, of which the first `count` are before.

  The two `_CHANGES` hold the indices of the problems whose share of right runs
  has fallen or grown.
  """
  before, after = is_right[:count], is_right[count:]
  changes = after.mean(0) - before.mean(0)
  return {
    "problems": is_right.shape[1],
    "before": float(before.mean()),
    "after": float(after.mean()),
    **statistics.paired_comparison(before, after),
    **{x: np.flatnonzero(sign * changes > 0) for x, sign in _CHANGES.items()},
  }


def _slices(
  problems: Sequence[records.Problem], column: str
) -> dict[str, list[int]]:
  """The values of a column, with the indices of the problems of each."""
  tables = [{**x.metadata, **figures.fields(vars(x))} for x in problems]
  members = figures.members(tables, column)
  if not members:
    known = sorted({name for table in tables for name in table})
    raise SettingError(
      f"--by ({column!r}) must name columns of the problems; name some of "
      f"{', '.join(map(shorten, known))}."
    )
  return members


def _same_problems(
  files: Sequence[epath.Path],
  found: Sequence[Mapping[str, results.Result]],
  data_dir: str,
) -> list[records.Problem]:
  """The problems that all files have, in the order of the first file."""
  pids = [pid for pid in found[0] if all(pid in run for run in found)]
  wanted: dict[str, records.Problem] = {}
  if data_dir:
    with user_errors():
      wanted = mixtures.problems_by_pid(data_dir, set(pids))
  problems, faults = [], []
  for pid in pids:
    own = [run[pid].problem for run in found]
    # The first of those that say most.
    best = max(own, key=lambda x: (bool(x.question), len(x.metadata)))
    problems.append(wanted.get(pid, best))
    versions = [*own, problems[-1]]
    texts = [x.question.replace(records.IMAGE_MARK, " ") for x in versions]
    questions = {tuple(text.split()) for text in texts} - {()}
    # A data dir may hold a corrected answer.
    fields = (*figures.TYPES, "choices", *(_RULES if pid not in wanted else ()))
    rules = {tuple(getattr(x, y) for y in fields) for x in versions}
    if len(questions) > 1 or len(rules) > 1:
      faults.append(f"{shorten(pid)} has another question or answer")
    elif data_dir and pid not in wanted and not figures.is_unreadable(pid):
      faults.append(f"{shorten(pid)} is not in --data_dir={data_dir}")
  if faults or not pids:
    raise SettingError(
      f"results files ({', '.join(map(str, files))}) must be of the same "
      f"problems, but of {len(pids)} pids in all files {len(faults)} differ"
      f"{': ' if faults else ''}{', '.join(faults[:3])}; compare files of one "
      "problem set, or name the problems that judge them with --data_dir."
    )
  return problems
