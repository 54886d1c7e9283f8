"""Offline preference GRPO on drawn pictures, on a CPU, in two minutes.

Each picture comes with a right reply and wrong ones that differ in the answer
alone. Nothing is sampled in training; the policy starts from `model.weights`,
and what it starts from stands for whoever wrote the replies.
"""

import ml_collections

from configs import smoke


def get_config() -> ml_collections.ConfigDict:
  """A tiny Gemma 3 learns to prefer right answers about colours."""
  config = smoke.get_config()
  config.data.kind = "preference"
  config.data.synthetic.num_problems = 4_000
  config.data.synthetic.kinds = ("color",)
  config.data.preference_completions = 2
  config.train.num_steps = 60
  config.eval.every_steps = 20
  config.eval.num_problems = 256
  config.optimizer.learning_rate = 2e-3
  config.optimizer.warmup_steps = 5
  config.checkpoint.every_steps = 60
  return config
