"""Offline preference GRPO on synthetic images, on a CPU, in a minute or two.

Each image comes with a right completion and a wrong one, which differ in the
answer alone. Training samples nothing. The old log-probabilities are those of
the model that `model.weights` names.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
  """A tiny Gemma 3 learns to prefer right answers about colours."""
  config = base.get_config()
  config.data.kind = "preference"
  config.data.synthetic.num_problems = 4_000
  config.data.synthetic.difficulty = 1
  config.data.synthetic.kinds = ("color",)
  config.data.synthetic.image_size = 48
  config.data.synthetic.multi_choice_share = 0.0
  config.data.synthetic.min_options = 3
  config.data.synthetic.max_options = 4
  config.data.prompt_buckets = (44, 256, 512, 1024)
  config.model.weights = "random:0"
  config.model.compute_dtype = "float32"
  config.model.train_vision = True
  config.rollout.max_new_tokens = 6
  config.train.num_steps = 60
  config.train.microbatch_bundles = 64
  config.optimizer.learning_rate = 2e-3
  config.optimizer.schedule = "linear"
  config.optimizer.warmup_steps = 5
  config.eval.every_steps = 20
  config.eval.num_problems = 256
  config.eval.batch_size = 256
  config.checkpoint.every_steps = 60
  return config
