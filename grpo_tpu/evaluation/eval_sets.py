"""The sets that a run evaluates: its eval split and those of `eval.sets`."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

from data_pipelines import dataset, records
from data_pipelines.sources import data_dirs, mixtures
from data_pipelines.text import run_prompts
from data_pipelines.validation import require
from grpo_tpu.config import eval_metrics
from grpo_tpu.config.schema import Config


def open_sets(
  config: Config, data: dataset.Dataset
) -> dict[str, dataset.Dataset]:
  """The run's data with the problems of each set as `eval`, by its name.

  The own split comes first, under the name "".

  Raises:
    ValueError: A data dir or a split is missing, or the template cannot write
      the prompts of a set.
  """
  opened = {"": data}
  for name, folder, split in config.eval.sets:
    found = data_dirs.open_dir("eval.sets", name, folder)
    data_dirs.require_split("eval.sets", split, found)
    problems = data_dirs.open_split([found], split)
    run_prompts.complete(
      data.template, few_shot=0, seed=0, train=(), asked=[problems]
    )
    records_of = f"eval.sets: records of {name}"
    opened[name] = dataclasses.replace(
      data,
      settings=dataclasses.replace(data.settings, eval_split=split),
      eval=problems,
      identity={records_of: found.manifest["fingerprint"]},
      eval_parts=data_dirs.parts([found], split),
    )
  return opened


def check_targets(config: Config, sets: dict[str, dataset.Dataset]) -> None:
  """Refuses a target that no problem of its set can give a value."""
  for setting, value, metric in eval_metrics.targets(
    config.train, config.checkpoint
  ):
    kind, _, inside = metric.removeprefix("eval/").partition("/")
    data, inside = (sets[inside], "") if inside in sets else (sets[""], inside)
    if not kind.startswith(("accuracy", "mean_at", "pass_at")):
      continue
    count = config.eval.num_problems
    problems = mixtures.first(data.eval, count)
    counts = any_problem(
      problems, count, functools.partial(_counts_for, inside)
    )
    rule = (
      "name a metric that is written, but no problem that counts for it of "
      f"split {data.settings.eval_split} has a public answer"
    )
    remedy = "name another metric, or evaluate other problems"
    require(counts, setting, value, rule, remedy)


def any_problem(
  problems: records.Source,
  count: int,
  holds: Callable[[records.Problem], bool],
) -> bool:
  """True if `holds` is true of one of the first `count` problems."""
  for index in range(min(count, len(problems))):
    with contextlib.suppress(ValueError, OSError):  # A damaged record.
      if holds(problems[index]):
        return True
  return False


def _counts_for(inside: str, problem: records.Problem) -> bool:
  """True if rules can check the problem, and it is of the type or data set."""
  data_set = problem.metadata.get("data_set")
  own = ("", problem.question_type, problem.answer_type, data_set)
  return problem.is_checkable and inside in own
