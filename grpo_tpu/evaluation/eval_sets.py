"""The sets that a run evaluates: its eval split and those of `eval.sets`."""

import contextlib
import dataclasses

from data_pipelines import dataset
from data_pipelines.sources import data_dirs, mixtures
from data_pipelines.text import run_prompts
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
    settings = dataclasses.replace(data.settings, eval_split=split)
    template = run_prompts.complete(
      data.template, few_shot=0, seed=0, train=(), asked=[problems]
    )
    identity = {f"eval.sets: records of {name}": found.manifest["fingerprint"]}
    opened[name] = dataclasses.replace(
      data,
      settings=settings,
      eval=problems,
      identity=identity,
      template=template,
      eval_parts=data_dirs.parts([found], split),
    )
  return opened


def check_targets(config: Config, sets: dict[str, dataset.Dataset]) -> None:
  """Refuses a target that no problem of its set can give a value.

  Raises:
    ValueError: The message names the setting, its value and the set.
  """
  for setting, value, metric in eval_metrics.targets(
    config.train, config.checkpoint
  ):
    kind, _, inside = metric.removeprefix("eval/").partition("/")
    own = inside if inside in sets else ""
    needs_answers = kind.startswith(("accuracy", "mean_at", "pass_at"))
    if needs_answers and not _has_answers(
      sets[own], config.eval.num_problems, "" if own else inside
    ):
      split = sets[own].settings.eval_split
      raise ValueError(
        f"{setting} ({value!r}) must name a metric that is written, but no "
        f"problem of {own or 'the split'} {split} that counts for it has a "
        "public answer; name another metric, or evaluate other problems."
      )


def _has_answers(data: dataset.Dataset, count: int, inside: str) -> bool:
  """True if rules can check a problem, of one type or data set if named."""
  problems = mixtures.first(data.eval, count)
  for index in range(min(count, len(problems))):
    with contextlib.suppress(ValueError, OSError):  # A damaged record.
      problem = problems[index]
      slices = problem.question_type, problem.answer_type
      own = (*slices, problem.metadata.get("data_set"))
      if problem.is_checkable and (not inside or inside in own):
        return True
  return False
