"""Answers to held-out problems, and what they are worth.

`evaluate` is the cheap look that training takes: greedy answers alone. `run`,
for --mode=evaluate, also samples, takes the pictures away, and writes all of
it down.
"""

import collections
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from data_pipelines import dataset, images, pipeline, records, validation
from data_pipelines.scoring import ablations
from grpo_tpu.checkpoint import load
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import collectives, sharding
from grpo_tpu.evaluation import report
from grpo_tpu.evaluation import scores as scorecard
from grpo_tpu.observability import samples, writer
from grpo_tpu.rewards import scoring
from grpo_tpu.rollout import generate
from grpo_tpu.rollout.sampler import Sampler

# Slices in the list of the worst; smaller ones say too little to be listed.
_WORST_SLICES, _MIN_PROBLEMS = 10, 5


@dataclasses.dataclass(frozen=True)
class Result:
  """What a greedy evaluation found.

  Attributes:
    scalars: By the names of `metrics`; a problem that could not be asked counts
      as one answered wrongly. Nothing is said of what public answers alone
      could tell where there are none.
    samples: Some completions of this host.
    answers: This host's, in the order of the split.
  """

  scalars: dict[str, writer.Scalar]
  samples: list[writer.Sample]
  answers: list[scorecard.GradedCompletion]


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """Everything that is said of a policy on a split, by all hosts.

  Attributes:
    scalars: As `Result` has them.
    greedy: The likeliest answers.
    samples: Sampled ones, draw by draw.
    ablated: The likeliest ones, by the ablation of their pictures.
  """

  scalars: dict[str, writer.Scalar]
  greedy: list[scorecard.GradedCompletion]
  samples: list[list[scorecard.GradedCompletion]]
  ablated: dict[str, list[scorecard.GradedCompletion]]


def evaluate(
  sampler: Sampler,
  params: dict,
  batches: Iterable[pipeline.Batch],
  *,
  rewards: scoring.RewardConfig,
  num_samples: int,
  poll: Callable[[], None] = generate.no_poll,
) -> Result:
  """Decodes one greedy completion for each problem and scores it.

  Args:
    sampler: Samples the completions.
    params: The parameters.
    batches: The problems of this process.
    rewards: Weights and limits of the rewards.
    num_samples: Number of completions to return for people to look at.
    poll: See `Sampler.sample`.
  """
  sums: collections.Counter[str] = collections.Counter()
  kept, answers = [], []
  for batch in batches:
    completions = sampler.sample(
      params,
      batch,
      jax.random.key(0),
      num_completions=1,
      temperature=0.0,
      poll=poll,
    ).completions
    texts = sampler.texts(completions)
    scores = _score(sampler, texts, batch, rewards)
    mask, stopped = sharding.local_rows(
      sampler.mesh, (completions.mask, completions.stopped)
    )
    columns = _columns(batch, scores, mask, stopped)
    sums.update(_sums(sharding.all_rows(sampler.mesh, columns)))
    answers += _answers(batch, [x[0] for x in texts], scores, stopped[:, 0])
    kept += samples.first_samples(
      sampler.mesh,
      batch,
      texts,
      scores.total,
      scores.components,
      count=num_samples - len(kept),
    )
  return Result(_scalars(sums), kept, answers)


def _score(
  sampler: Sampler,
  texts: list[list[str]],
  prompts: pipeline.Batch,
  rewards: scoring.RewardConfig,
) -> scoring.Scores:
  return scoring.score_groups(
    texts,
    prompts.problems,
    rewards,
    gather=functools.partial(sharding.all_rows, sampler.mesh),
  )


def sample_answers(
  sampler: Sampler,
  params: dict,
  batches: Iterable[pipeline.Batch],
  config: Config,
) -> list[list[scorecard.GradedCompletion]]:
  """This process's answers: `eval.num_samples` draws for each problem.

  A draw depends only on the run's seed, the problem's index in the split and
  the draw's number.
  """
  settings = config.eval
  draws: list[list[scorecard.GradedCompletion]] = [
    [] for _ in range(settings.num_samples)
  ]
  for batch in batches:
    completions = sampler.sample(
      params,
      batch,
      jax.random.key(config.seed),
      num_completions=settings.num_samples,
      temperature=settings.temperature,
      top_k=settings.top_k,
      top_p=settings.top_p,
    ).completions
    texts = sampler.texts(completions)
    stopped = sharding.local_rows(sampler.mesh, completions.stopped)
    for number, draw in enumerate(draws):
      column = [group[number : number + 1] for group in texts]
      scores = _score(sampler, column, batch, config.rewards)
      draw += _answers(
        batch, [x[0] for x in column], scores, stopped[:, number]
      )
  return draws


def run(config: Config, workdir: str, data: dataset.Dataset) -> None:
  """Evaluates `model.weights` on the held-out split and writes what it found.

  Raises:
    SettingError: A setting that only the data, devices or weights can refute.
  """
  with validation.user_errors():
    blind = _ablated_sources(config, data)
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    # What is named in the report is what was read, while a run goes on.
    weights = load.resolve_weights(config.model.weights)
    model = dataclasses.replace(config.model, weights=weights)
    config = dataclasses.replace(config, model=model)
    sampler = Sampler(model, config.rollout, mesh, data.tokenizer)
    params = load.load_params(model, mesh)
    shards, shard_count = sharding.data_shards(mesh)
    batches = data.eval_batches(
      num_problems=config.eval.num_problems,
      batch_size=config.eval.batch_size,
      shards=shards,
      shard_count=shard_count,
    )
  with jax.set_mesh(mesh):
    found = evaluate_all(sampler, params, batches, blind, config)
  if jax.process_index() == 0:
    write(found, workdir, config, data.eval)


def evaluate_all(
  sampler: Sampler,
  params: dict,
  batches: pipeline.EvalBatches,
  blind: dict[str, records.Source],
  config: Config,
) -> Evaluation:
  """Greedy answers, sampled ones, and greedy ones to the sources in `blind`."""

  def greedy_answers(batches: pipeline.EvalBatches) -> Result:
    return evaluate(
      sampler, params, batches, rewards=config.rewards, num_samples=0
    )

  greedy = greedy_answers(batches)
  draws, ablated = [], {}
  if config.eval.num_samples:
    draws = sample_answers(sampler, params, batches, config)
  for name, source in blind.items():
    result = greedy_answers(batches.with_source(source))
    ablated[name] = _of_all_hosts(result.answers)
  return Evaluation(
    scalars=greedy.scalars,
    greedy=_of_all_hosts(greedy.answers),
    samples=[_of_all_hosts(draw) for draw in draws],
    ablated=ablated,
  )


def write(
  found: Evaluation,
  workdir: str,
  config: Config,
  problems: records.Source,
) -> None:
  """Writes answers, scores and reports under `workdir`/eval.

  Args:
    found: What there is to say.
    workdir: Of the run.
    config: Its settings, the step in `model.weights` spelt out.
    problems: The split, whose pictures the report shows.
  """
  folder = pathlib.Path(workdir) / "eval"
  split, settings = config.data.eval_split, config.eval
  _write_json(folder / f"output_{split}.json", _results(found.greedy))
  for number, draw in enumerate(found.samples):
    name = f"output_{split}_{number:03}.json"
    _write_json(folder / "samples" / name, _results(draw))
  for name, answers in found.ablated.items():
    _write_json(folder / f"output_{split}_{name}.json", _results(answers))
  scores = {
    "split": split,
    "split_size": len(problems),
    "model": config.model.name,
    "weights": config.model.weights,
    "seed": config.seed,
    "temperature": settings.temperature if found.samples else 0.0,
  }
  scores |= scorecard.compute(
    found.greedy, samples=found.samples, ks=settings.ks, ablated=found.ablated
  )
  scores["scalars"] = {k: float(v) for k, v in found.scalars.items()}
  _write_json(folder / "scores.json", scores)
  worst = scorecard.worst_slices(
    scores, count=_WORST_SLICES, min_problems=_MIN_PROBLEMS
  )
  examples = [
    _example(answer, found.samples, problems)
    for answer in scorecard.examples(found.greedy, settings.num_examples)
  ]
  for name, text in (
    ("report.md", report.markdown(scores, worst, examples)),
    ("report.html", report.html(scores, worst, examples)),
  ):
    (folder / name).write_text(text, encoding="utf-8")
  logging.info("%s; the report is in %s", report.line(scores), folder)
  if len(problems) > len(found.greedy):
    logging.warning(
      "eval.num_problems (%d) leaves out %d problems of %s.",
      settings.num_problems,
      len(problems) - len(found.greedy),
      split,
    )


def _ablated_sources(
  config: Config, data: dataset.Dataset
) -> dict[str, records.Source]:
  """What to ask beside the real problems, by the name of the ablation."""
  if not config.eval.ablations:
    return {}
  if config.model_config.vision is None:
    logging.info("eval.ablations: %s sees no pictures.", config.model.name)
    return {}
  count = min(config.eval.num_problems, len(data.eval))
  if not _any_answers(data.eval, count):
    logging.info("eval.ablations: without answers there is no accuracy.")
    return {}
  return {
    name: ablations.source(
      name, data.eval, num_problems=count, seed=config.seed
    )
    for name in config.eval.ablations
  }


def _any_answers(problems: records.Source, count: int) -> bool:
  for index in range(count):
    try:
      if problems[index].has_answer:
        return True
    except (ValueError, OSError):
      continue
  return False


def _example(
  answer: scorecard.GradedCompletion,
  draws: list[list[scorecard.GradedCompletion]],
  problems: records.Source,
) -> report.Example:
  """An answer with its image and the number of right samples."""
  try:
    image = report.image_uri(images.decode(problems[answer.index].image_bytes))
  except (ValueError, OSError):
    image = ""
  others = [x for draw in draws for x in draw if x.index == answer.index]
  return report.Example(
    record=answer.record,
    outcome=answer.outcome,
    num_samples=len(others),
    samples_right=sum(x.is_right for x in others),
    image=image,
  )


def _results(
  answers: list[scorecard.GradedCompletion],
) -> dict[str, dict[str, Any]]:
  return {answer.record["pid"]: answer.record for answer in answers}


def _write_json(path: pathlib.Path, value: Any) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(value, indent=2, ensure_ascii=False)
  path.write_text(f"{text}\n", encoding="utf-8")


def _of_all_hosts(
  answers: list[scorecard.GradedCompletion],
) -> list[scorecard.GradedCompletion]:
  """The answers of every host, in the order of the split."""
  local = json.dumps([dataclasses.asdict(x) for x in answers])
  # Hosts that a tensor axis spans have the same rows.
  once = {
    fields["index"]: scorecard.GradedCompletion(**fields)
    for host in collectives.gather_bytes(local.encode())
    for fields in json.loads(host)
  }
  return [once[index] for index in sorted(once)]


_SLICES = ("multi_choice", "free_form", "integer", "float", "text", "list")


def _columns(batch, scores, mask, stopped) -> dict[str, np.ndarray]:
  """What adds up over rows, batches and hosts, a number for each row."""
  # Padding has no pid; a damaged record has one, and counts as wrong.
  counts = np.array([bool(p.pid) for p in batch.problems])
  # A user's reward that fails says nothing about the answer.
  asked = counts & batch.valid & ~scores.failed["accuracy"]
  public = np.array([p.has_answer for p in batch.problems])
  graded = counts & (public | ~_is_read(batch))
  accuracy = graded & _is_right(batch, scores)
  columns = {
    "problems": counts,
    "public": public,
    "graded": graded,
    "asked": asked,
    "accuracy": accuracy,
    "format": np.where(asked, scores.components["format"], 0.0),
    "reward": np.where(asked & graded, scores.total, 0.0),
    "completion_length": np.where(asked, mask[:, 0].sum(-1), 0),
    "truncated_fraction": asked & ~stopped[:, 0],
  }
  for name in _SLICES:
    inside = graded & np.array(
      [name in (p.question_type, p.answer_type) for p in batch.problems]
    )
    columns[f"graded/{name}"] = inside
    columns[f"accuracy/{name}"] = accuracy & inside
  return {name: rows.astype(np.float32) for name, rows in columns.items()}


def _sums(columns: dict[str, np.ndarray]) -> dict[str, float]:
  """Of all rows, in their order: the same on any number of hosts."""
  return {name: rows.sum(dtype=float) for name, rows in columns.items()}


def _is_read(batch: pipeline.Batch) -> np.ndarray:
  """Which rows hold a problem, and not a stand-in for a damaged record."""
  return np.array([bool(p.question) for p in batch.problems])


def _is_right(batch: pipeline.Batch, scores: scoring.Scores) -> np.ndarray:
  return batch.valid & (scores.components["accuracy"] > 0.5)


def _scalars(totals: Mapping[str, float]) -> dict[str, writer.Scalar]:
  problems, asked = max(totals["problems"], 1), max(totals["asked"], 1)
  scalars: dict[str, writer.Scalar] = {
    "eval/format": totals["format"] / problems,
    "eval/completion_length": totals["completion_length"] / asked,
    "eval/truncated_fraction": totals["truncated_fraction"] / asked,
  }
  if not totals["public"]:
    return scalars
  scalars["eval/accuracy"] = totals["accuracy"] / totals["graded"]
  scalars["eval/reward"] = totals["reward"] / totals["graded"]
  for name in _SLICES:
    if totals[f"graded/{name}"]:
      scalars[f"eval/accuracy/{name}"] = (
        totals[f"accuracy/{name}"] / totals[f"graded/{name}"]
      )
  return scalars


def _answers(
  batch: pipeline.Batch,
  texts: list[str],
  scores: scoring.Scores,
  stopped: np.ndarray,
) -> list[scorecard.GradedCompletion]:
  """What one completion of each problem says, padding left out."""
  is_right, is_read = _is_right(batch, scores), _is_read(batch)
  answers = []
  for row, problem in enumerate(batch.problems):
    if not problem.pid:
      continue
    asked = bool(batch.valid[row])
    graded = problem.has_answer or not is_read[row]
    record = _record(
      problem,
      response=texts[row] if asked else "",
      answer=scores.answers[row] if asked else None,
    )
    record["true_false"] = bool(is_right[row]) if graded else None
    answers.append(
      scorecard.GradedCompletion(
        index=int(batch.prompt_index[row]),
        record=record,
        asked=asked,
        stopped=bool(stopped[row]),
      )
    )
  return answers


def _record(problem, *, response: str, answer: str | None) -> dict[str, Any]:
  """MathVista's results format, its image left out."""
  return {
    "pid": problem.pid,
    "question": problem.question,
    "image": problem.image_path,
    "choices": list(problem.choices) or None,
    "unit": problem.unit or None,
    "precision": problem.precision if problem.precision >= 0 else None,
    "answer": problem.answer,
    "question_type": problem.question_type,
    "answer_type": problem.answer_type,
    "metadata": dict(problem.metadata),
    "query": problem.query,
    "response": response,
    "extraction": answer,
    "prediction": answer,
  }
