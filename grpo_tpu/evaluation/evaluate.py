"""Evaluates parameters on a split.

`evaluate` returns figures, for notebooks. `run`, for --mode=evaluate, also
writes all results. `evaluate_greedy` is the part that training calls.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from data_pipelines import dataset, pipeline, records, validation
from data_pipelines.scoring import ablations
from data_pipelines.sources import mixtures
from grpo_tpu.checkpoint import load
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import activity, collectives, sharding
from grpo_tpu.evaluation import eval_sets, grading, outputs
from grpo_tpu.evaluation.scores import GradedCompletion, sample_metrics
from grpo_tpu.observability import sample_files
from grpo_tpu.rewards import scoring
from grpo_tpu.rewards.settings import RewardConfig
from grpo_tpu.rl import samples
from grpo_tpu.rollout import generate
from grpo_tpu.rollout.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class GreedyResult:
  """The result of a greedy evaluation.

  A problem that cannot be asked counts as answered wrongly.
  """

  scalars: dict[str, float]  # The `eval/` metrics of all hosts.
  samples: list[
    sample_files.Sample
  ]  # Some completions of this host, for people.
  # All completions of this host, in the order of the split.
  completions: list[GradedCompletion]


def evaluate(
  sampler: Sampler, params: dict, data: dataset.Dataset, config: Config
) -> dict[str, Any]:
  """Evaluates parameters on the eval split.

  Returns the figures of `scores.compute`, and the `eval/` metrics as `scalars`.
  """
  problems = mixtures.first(data.eval, config.eval.num_problems)
  sources = make_ablated_sources(config, problems)
  batches = make_batches(data, config, sampler.mesh)
  with jax.set_mesh(sampler.mesh):
    evaluation = evaluate_all(sampler, params, batches, sources, config)
  return evaluation.figures(config.eval.pass_ks)


def run(config: Config, workdir: str, data: dataset.Dataset) -> str:
  """Evaluates `model.weights` on the eval split and on `eval.sets`.

  Writes `workdir`/eval, and `workdir`/eval/NAME for each further set. Returns
  what to do next.

  Raises:
    SettingError: A setting does not fit the data, the devices or the weights.
  """
  with validation.user_errors():
    sets = eval_sets.open_sets(config, data)
    problems = {
      name: mixtures.first(each.eval, config.eval.num_problems)
      for name, each in sets.items()
    }
    sources = {k: make_ablated_sources(config, x) for k, x in problems.items()}
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    # The report names the step that was read, even if a run saves newer ones.
    weights = load.resolve_weights(config.model.weights)
    model = dataclasses.replace(config.model, weights=weights)
    sampler = Sampler(model, config.rollout, mesh, data.tokenizer)
    params = load.load_params(model, mesh)
    batches = {k: make_batches(x, config, mesh, k) for k, x in sets.items()}
  for name, each in sets.items():
    with jax.set_mesh(mesh), activity.reporting():
      evaluation = evaluate_all(
        sampler, params, batches[name], sources[name], config, name=name
      )
    if jax.process_index() == 0:
      facts = {
        "set": name,
        "split": each.settings.eval_split,
        "split_size": len(each.eval),
        "parts": each.eval_parts,
        "model": config.model.name,
        "weights": weights,
        "seed": config.seed,
      }
      folder = pathlib.Path(workdir) / "eval" / name
      outputs.write(evaluation, folder, problems[name], config.eval, facts)
  return f"open {pathlib.Path(workdir) / 'eval' / 'report.html'}"


def evaluate_all(
  sampler: Sampler,
  params: dict,
  batches: pipeline.EvalBatches,
  ablated_sources: Mapping[str, records.Source],
  config: Config,
  *,
  name: str = "",
) -> outputs.Evaluation:
  """Evaluates greedily, by sampling, and greedily with ablated images."""
  result, draws = evaluate_set(sampler, params, batches, config, name=name)
  ablated = {
    kind: evaluate_greedy(
      sampler,
      params,
      batches.with_source(source),
      rewards=config.rewards,
      num_samples=0,
    ).completions
    for kind, source in ablated_sources.items()
  }
  return outputs.Evaluation(
    scalars=result.scalars,
    greedy=_gather(result.completions),
    samples=[_gather(draw) for draw in draws],
    ablated={kind: _gather(x) for kind, x in ablated.items()},
  )


def evaluate_set(
  sampler: Sampler,
  params: dict,
  batches: Iterable[pipeline.Batch],
  config: Config,
  *,
  name: str = "",
  num_shown: int = 0,
  poll: Callable[[], None] = generate.no_poll,
) -> tuple[GreedyResult, list[list[GradedCompletion]]]:
  """Evaluates one set greedily, and with `eval.num_samples` if there are any.

  Returns the greedy result with the metrics of both, and this host's sampled
  completions, one list per draw. `num_shown` completions are for people.
  """
  result = evaluate_greedy(
    sampler,
    params,
    batches,
    rewards=config.rewards,
    num_samples=num_shown,
    poll=poll,
  )
  if not config.eval.num_samples:
    return result, []
  key = sampling_key(config.seed, name)
  draws = _sample_draws(sampler, params, batches, config, key, poll)
  sampled = sample_metrics(
    _count_right(draws),
    num_samples=config.eval.num_samples,
    ks=config.eval.pass_ks,
  )
  scalars = result.scalars | sampled
  return dataclasses.replace(result, scalars=scalars), draws


def sampling_key(seed: int, name: str) -> jax.Array:
  """The key of the samples of a set, the same at every step.

  Training folds the numbers of its batches, from 1 on, into the run's key.
  """
  key = jax.random.fold_in(jax.random.key(seed), 0)
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def evaluate_greedy(
  sampler: Sampler,
  params: dict,
  batches: Iterable[pipeline.Batch],
  *,
  rewards: RewardConfig,
  num_samples: int,
  poll: Callable[[], None] = generate.no_poll,
) -> GreedyResult:
  """Decodes and grades one greedy completion per problem of this process.

  For `poll` see `Sampler.sample`.
  """
  all_rows = functools.partial(sharding.all_rows, sampler.mesh)
  sums: collections.Counter[str] = collections.Counter()
  kept, graded = [], []
  for batch in activity.count_parts("evaluation", batches, unit="batches"):
    completions = sampler.sample(
      params,
      batch,
      jax.random.key(0),
      num_completions=1,
      temperature=0.0,
      poll=poll,
    ).completions
    groups = sampler.texts(completions)
    texts = [group[0] for group in groups]
    mask, stopped = sharding.local_rows(
      sampler.mesh, (completions.mask, completions.stopped)
    )
    scores = scoring.score(
      texts,
      batch.problems,
      rewards,
      is_present=batch.valid,
      truncated=(~stopped[:, 0]).tolist(),
      gather=all_rows,
    )
    columns = grading.metric_columns(
      batch, scores, mask, stopped, pays_unchecked=any(rewards.custom_weights)
    )
    # All rows are summed in their order, so the number of hosts is irrelevant.
    sums.update(
      {k: rows.sum(dtype=float) for k, rows in all_rows(columns).items()}
    )
    graded += grading.graded_completions(batch, texts, scores, stopped[:, 0])
    kept += samples.first_samples(
      sampler, batch, groups, scores, count=num_samples - len(kept)
    )
  return GreedyResult(grading.metrics(sums), kept, graded)


def make_ablated_sources(
  config: Config, problems: records.Source
) -> dict[str, records.Source]:
  """The sources of the ablations that can be evaluated, by name."""
  if not config.eval.ablations:
    return {}
  if config.model_config.vision is None:
    logging.info("No eval.ablations: %s is a text model.", config.model.name)
    return {}
  count = min(config.eval.num_problems, len(problems))
  if not _any_images(problems, count):
    logging.info(
      "No eval.ablations: no problem shows an image and has a public answer."
    )
    return {}
  return {
    name: ablations.source(name, problems, num_problems=count, seed=config.seed)
    for name in config.eval.ablations
  }


def _any_images(problems: records.Source, count: int) -> bool:
  """True if a problem that rules can check shows an image."""
  for index in range(count):
    with contextlib.suppress(ValueError, OSError):  # A damaged record.
      if problems[index].is_checkable and problems[index].images:
        return True
  return False


def make_batches(
  data: dataset.Dataset, config: Config, mesh: Mesh, name: str = ""
) -> pipeline.EvalBatches:
  """The problems of this process, of the set with this name."""
  shards, shard_count = sharding.data_shards(mesh)
  split = data.settings.eval_split
  return data.eval_batches(
    num_problems=config.eval.num_problems,
    batch_size=config.eval.batch_size,
    split=f"{name} ({split})" if name else split,
    shards=shards,
    shard_count=shard_count,
  )


def _sample_draws(
  sampler: Sampler,
  params: dict,
  batches: Iterable[pipeline.Batch],
  config: Config,
  key: jax.Array,
  poll: Callable[[], None],
) -> list[list[GradedCompletion]]:
  """Samples and grades `eval.num_samples` completions of each problem.

  A completion depends only on the key, the problem's index in the split and the
  number of the draw. Returns one list of this host's completions per draw.
  """
  settings = config.eval
  all_rows = functools.partial(sharding.all_rows, sampler.mesh)
  draws = [list[GradedCompletion]() for _ in range(settings.num_samples)]
  for batch in activity.count_parts("sampling", batches, unit="batches"):
    completions = sampler.sample(
      params, batch, key, **settings.ways[-1], poll=poll
    ).completions
    groups = sampler.texts(completions)
    stopped = sharding.local_rows(sampler.mesh, completions.stopped)
    for number, draw in enumerate(draws):
      texts = [group[number] for group in groups]
      ended = stopped[:, number]
      scores = scoring.score(
        texts,
        batch.problems,
        config.rewards,
        is_present=batch.valid,
        truncated=(~ended).tolist(),
        gather=all_rows,
      )
      draw += grading.graded_completions(batch, texts, scores, ended)
  return draws


def _count_right(draws: Sequence[Sequence[GradedCompletion]]) -> list[int]:
  """The right samples of each graded problem of all hosts, in their order.

  Empty if no answer is public.
  """
  local = [
    (row[0].index, bool(row[0].record["answer"]), sum(x.is_right for x in row))
    for row in zip(*draws, strict=True)
    if row[0].record["strict_true_false"] is not None
  ]
  hosts = collectives.gather_bytes(json.dumps(local).encode())
  # Hosts that share a tensor axis have the same rows.
  rows = sorted({tuple(row) for host in hosts for row in json.loads(host)})
  is_public = any(has_answer for _, has_answer, _ in rows)
  return [count for _, _, count in rows] if is_public else []


def _gather(completions: list[GradedCompletion]) -> list[GradedCompletion]:
  """The completions of every host, in the order of the split."""
  local = json.dumps([dataclasses.asdict(x) for x in completions])
  # Hosts that share a tensor axis have the same rows.
  by_index = {
    fields["index"]: GradedCompletion(**fields)
    for host in collectives.gather_bytes(local.encode())
    for fields in json.loads(host)
  }
  return [by_index[index] for index in sorted(by_index)]
