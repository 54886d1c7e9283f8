"""Opens a mode: checks all that it reads before devices start, then runs it."""

import dataclasses
import gc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from grpo_tpu.config import flags
from grpo_tpu.config.schema import Config


def resolve(config: Config) -> Config:
  """The settings with the weights and the data that the mode reads."""
  from grpo_tpu.config import sources

  mode, workdir = flags.MODE.value, flags.workdir()
  config = sources.resolve(config, mode, workdir, flags.has_override)
  return sources.fix_networks(config, workdir) if mode == "train" else config


def open_mode(config: Config, report: Any) -> tuple[Callable, Mapping]:
  """The mode, ready to run, and the fingerprints of the data it opened."""
  mode, workdir = flags.MODE.value, flags.workdir()
  if mode == "plan":
    from grpo_tpu.planning import plan

    run = partial(plan.run, advise=flags.ADVISE.value)
    return partial(run, config, workdir, flags.TOPOLOGY.value), {}
  if mode == "export":
    from grpo_tpu.checkpoint import export

    export.check(config.model, config.export, workdir)
    parts = config.model, config.export, config.mesh
    return partial(export.run, *parts, workdir), {}
  if mode == "answer":
    from grpo_tpu.evaluation import answer

    asked = flags.QUESTION.value, flags.IMAGES.value
    heat, count = flags.TEMPERATURE.value, flags.SAMPLES.value
    return answer.open_answers(config, *asked, heat, count), {}
  from data_pipelines import dataset
  from grpo_tpu.config import sources
  from grpo_tpu.evaluation import eval_sets, evaluate
  from grpo_tpu.train import loop

  gc.freeze()  # Modules are no garbage: no collection looks at them again.
  data = dataset.open_dataset(
    config.data,
    config.model_inputs,
    workdir,
    for_training=mode == "train",
    seed=config.seed,
  )
  sets = eval_sets.open_sets(config, data)
  identity = {k: x for each in sets.values() for k, x in each.identity.items()}
  if mode == "evaluate":
    return partial(evaluate.run, config, workdir, data), identity
  eval_sets.check_targets(config, sets)
  index = data.train_index
  has_images = index is not None and bool(index.num_images.any())
  own = sources.network_identity(config, data.tokenizer, has_images=has_images)
  data = dataclasses.replace(data, identity=data.identity | own)
  identity |= own
  return partial(loop.train, config, workdir, data, report), identity
