"""Evaluates parameters on a split.

`evaluate` returns figures, for notebooks. `run`, for --mode=evaluate, also
writes all results. `evaluate_set` is the part that training calls.
"""

import collections
import dataclasses
import functools
import json
import shlex
import types
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from data_pipelines import dataset, pipeline, records, validation
from data_pipelines.scoring import ablations
from data_pipelines.sources import mixtures
from data_pipelines.storage import paths
from grpo_tpu.checkpoint import load
from grpo_tpu.config.schema import Config
from grpo_tpu.distributed import activity, collectives, sharding
from grpo_tpu.evaluation import eval_sets, grading, outputs, reward_models
from grpo_tpu.evaluation.scores import GradedCompletion, sample_metrics
from grpo_tpu.observability import sample_files
from grpo_tpu.rewards import scoring
from grpo_tpu.rewards.combination import Combination
from grpo_tpu.rewards.networks import Completed
from grpo_tpu.rl import samples
from grpo_tpu.rl.experience import Collector
from grpo_tpu.rollout import generate
from grpo_tpu.rollout.sampler import Sampler


def evaluate(
  sampler: Sampler, params: dict, data: dataset.Dataset, config: Config
) -> dict[str, Any]:
  """Evaluates parameters on the eval split.

  Returns the figures of `scores.compute`, and the `eval/` metrics as `scalars`.
  """
  sources = make_ablated_sources(config, data.eval)
  batches = make_batches(data, config, sampler.mesh)
  with jax.set_mesh(sampler.mesh):
    evaluation = evaluate_set(
      sampler, params, batches, config, ablated_sources=sources
    )
  return evaluation.figures(config.eval.pass_ks)


def run(config: Config, workdir: str, data: dataset.Dataset) -> str:
  """Evaluates `model.weights` on the eval split and on `eval.sets`.

  A policy answers the problems, a reward model scores labelled completions.
  Writes `workdir`/eval, and `workdir`/eval/NAME for each further set. Returns
  what to do next.

  Raises:
    SettingError: A setting does not fit the data, the devices or the weights.
  """
  with validation.user_errors():
    sets = eval_sets.open_sets(config, data)
    sources = {k: make_ablated_sources(config, x.eval) for k, x in sets.items()}
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    # The report names the step that was read, even if a run saves newer ones.
    weights = load.resolve_weights(config.model.weights)
    model = dataclasses.replace(config.model, weights=weights)
    sampler = Sampler(model, config.rollout, mesh, data.tokenizer)
    params = load.load_params(model, mesh)
    scores_pairs = config.objective.is_reward_model
    batches = {
      k: make_batches(x, config, mesh, k, labelled=scores_pairs)
      for k, x in sets.items()
    }
    collector = Collector(sampler, config.collector_config)
  for name, each in sets.items():
    with jax.set_mesh(mesh), activity.reporting():
      if scores_pairs:
        evaluation = reward_models.evaluate(collector, params, batches[name])
      else:
        evaluation = evaluate_set(
          *(sampler, params, batches[name], config),
          name=name,
          ablated_sources=sources[name],
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
      folder = epath.Path(workdir) / "eval" / name
      if isinstance(evaluation, outputs.Evaluation):
        problems = mixtures.first(each.eval, config.eval.num_problems)
        outputs.write(evaluation, folder, problems, config.eval, facts)
      else:
        reward_models.write(evaluation, folder, facts)
  page = epath.Path(workdir) / "eval" / "report.html"
  is_remote = paths.is_remote(page)
  copy = f"gcloud storage cp {shlex.quote(str(page))} . && " * is_remote
  return f"{copy}open {page.name if is_remote else page}"


def evaluate_set(
  sampler: Sampler,
  params: dict,
  batches: pipeline.EvalBatches,
  config: Config,
  *,
  name: str = "",
  ablated_sources: Mapping[str, records.Source] = types.MappingProxyType({}),
  num_shown: int = 0,
  poll: Callable[[], None] = generate.no_poll,
  combination: Combination | None = None,
) -> outputs.Evaluation:
  """Evaluates one set greedily, with `eval.num_samples` and with ablations.

  `num_shown` greedy completions are for people. For `poll` see
  `Sampler.sample`. Without a `combination` no network adds to the rewards.
  """
  grade = functools.partial(
    _grade_completions,
    sampler,
    params,
    config=config,
    poll=poll,
    combination=combination,
  )
  greedy, *drawn = config.eval.ways
  key = sampling_key(config.seed, name)
  (answers,), scalars, shown = grade(batches, greedy, key, num_shown=num_shown)
  samples = [x for way in drawn for x in grade(batches, way, key)[0]]
  return outputs.Evaluation(
    scalars=scalars | sample_metrics(samples, config.eval.pass_ks),
    shown=shown,
    greedy=answers,
    samples=samples,
    ablated={
      kind: grade(batches.with_source(source), greedy, key)[0][0]
      for kind, source in ablated_sources.items()
    },
  )


def sampling_key(seed: int, name: str) -> jax.Array:
  """The key of the samples of a set, the same at every step.

  Training folds the numbers of its batches, from 1 on, into the run's key.
  """
  key = jax.random.fold_in(jax.random.key(seed), 0)
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _grade_completions(
  sampler: Sampler,
  params: dict,
  batches: Iterable[pipeline.Batch],
  way: Mapping[str, Any],
  key: jax.Array,
  *,
  config: Config,
  poll: Callable[[], None],
  combination: Combination | None,
  num_shown: int = 0,
) -> tuple[
  list[list[GradedCompletion]], dict[str, float], list[sample_files.Sample]
]:
  """Completes and grades all problems in one of `eval.ways`.

  A completion depends only on the key, the problem's index in the split and the
  number of the draw.

  Returns:
    The completions of all hosts in the order of the split, one list per draw;
    the `eval/` metrics of all draws; and the completions to show.
  """
  all_rows = functools.partial(sharding.all_rows, sampler.mesh)
  sums, shown = collections.Counter[str](), list[sample_files.Sample]()
  draws = [list[GradedCompletion]() for _ in range(way["num_completions"])]
  parts = list[dict[str, np.ndarray]]()
  for batch in activity.count_parts("evaluation", batches, unit="batches"):
    completions = sampler.sample(
      params, batch, key, **way, poll=poll
    ).completions
    groups, join = sampler.texts(completions), None
    if combination:
      join = combination.start(
        batch,
        Completed(completions.ids, completions.mask, groups),
        np.repeat(batch.valid[:, None], len(draws), axis=1),
        split="eval/",
      )
    mask, stopped = sharding.local_rows(
      sampler.mesh, (completions.mask, completions.stopped)
    )
    for number, draw in enumerate(draws):
      texts, ended = [group[number] for group in groups], stopped[:, number]
      scores = scoring.score(
        texts,
        batch.problems,
        config.rewards,
        is_present=batch.valid,
        truncated=(~ended).tolist(),
        gather=all_rows,
      )
      if join:
        scores = join(scores, number)
      columns = grading.metric_columns(
        *(batch, scores, mask[:, number], ended),
        rewards_unchecked=config.rewards.rewards_unchecked,
      )
      # All rows are summed in their order, so the number of hosts is
      # irrelevant.
      networks = {
        f"eval/reward/{k}_pair_accuracy": np.where(scores.valid, x, np.nan)
        for k, x in scores.components.items()
        if k in config.rewards.network_weights
      }
      rows = all_rows(columns | networks)
      sums.update({k: rows[k].sum(dtype=float) for k in columns})
      parts.append(rows)
      draw += grading.graded_completions(batch, texts, scores, ended)
      shown += samples.first_samples(
        sampler, batch, groups, scores, count=num_shown - len(shown)
      )
  metrics = grading.metrics(sums) | grading.pair_accuracies(parts)
  return [_gather(draw) for draw in draws], metrics, shown


def make_ablated_sources(
  config: Config, problems: records.Source
) -> dict[str, records.Source]:
  """The sources of the ablations that can be evaluated, by name."""
  names, count = config.eval.ablations, config.eval.num_problems
  problems = mixtures.first(problems, count)
  can_see = config.model_config.vision is not None and eval_sets.any_problem(
    problems, count, lambda x: x.is_checkable and bool(x.images)
  )
  if names and not can_see:
    logging.info(
      "No eval.ablations: %s sees no image of a problem with a public answer.",
      config.model.name,
    )
  return {
    name: ablations.source(name, problems, num_problems=count, seed=config.seed)
    for name in names
    if can_see
  }


def make_batches(
  data: dataset.Dataset,
  config: Config,
  mesh: Mesh,
  name: str = "",
  *,
  labelled: bool = False,
) -> pipeline.EvalBatches:
  """The problems of this process, of the set with this name.

  With `labelled` completions, a problem with a longer one than the settings
  allow is skipped.
  """
  shards, shard_count = sharding.data_shards(mesh)
  split = data.settings.eval_split
  options: dict[str, Any] = {
    "num_problems": config.eval.num_problems,
    "batch_size": config.eval.batch_size,
    "split": f"{name} ({split})" if name else split,
    "shards": shards,
    "shard_count": shard_count,
  }
  if not labelled:
    return data.eval_batches(**options)
  length = config.rollout.max_new_tokens
  return data.preference_batches(max_new_tokens=length, **options)


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
