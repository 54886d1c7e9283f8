"""GRPO post-training of Gemma 3, text and vision, on TPU pods.

The public names of the library. Each is imported when it is first used, so that
`import grpo_tpu` costs nothing and does not import JAX:

  config = grpo_tpu.Config.from_config_dict(grpo_tpu.default_config())
  mesh = grpo_tpu.make_mesh(**dataclasses.asdict(config.mesh))
  params = grpo_tpu.load_params(config.model, mesh)
"""

import importlib
import typing

if typing.TYPE_CHECKING:
  from data_pipelines.verifier.verify import verify as verify
  from grpo_tpu.checkpoint.load import load_params as load_params
  from grpo_tpu.config import defaults
  from grpo_tpu.config.schema import Config as Config
  from grpo_tpu.distributed.sharding import make_mesh as make_mesh
  from grpo_tpu.evaluation.evaluate import evaluate as evaluate
  from grpo_tpu.rl.objective import group_advantages as group_advantages
  from grpo_tpu.rl.objective import policy_loss as policy_loss
  from grpo_tpu.rollout.sampler import Sampler as Sampler
  from grpo_tpu.train.trainer import Trainer as Trainer

  default_config = defaults.get_config

__version__ = "0.1.0"
_HOMES = {
  "Config": "grpo_tpu.config.schema.Config",
  "Sampler": "grpo_tpu.rollout.sampler.Sampler",
  "Trainer": "grpo_tpu.train.trainer.Trainer",
  "default_config": "grpo_tpu.config.defaults.get_config",
  "evaluate": "grpo_tpu.evaluation.evaluate.evaluate",
  "group_advantages": "grpo_tpu.rl.objective.group_advantages",
  "load_params": "grpo_tpu.checkpoint.load.load_params",
  "make_mesh": "grpo_tpu.distributed.sharding.make_mesh",
  "policy_loss": "grpo_tpu.rl.objective.policy_loss",
  "verify": "data_pipelines.verifier.verify.verify",
}


def __getattr__(name: str) -> typing.Any:
  if name not in _HOMES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module, _, attribute = _HOMES[name].rpartition(".")
  return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
  return [*_HOMES, "__version__"]
