"""A tiny Gemma 3 that learns to see, on a CPU, in minutes.

`configs/smoke.py` is online GRPO. `configs/smoke.py:warm_start` is the
supervised run on demonstrations that `launch/smoke.sh` starts first.
`configs/smoke.py:reward_model` learns from right and wrong answers to the same
problems to tell them apart; it starts from the warm start.
"""

import ml_collections

from configs import base


def get_config(stage: str = "grpo") -> ml_collections.ConfigDict:
  """The settings of the stage "warm_start", "reward_model" or "grpo"."""
  stages = ("warm_start", "reward_model", "grpo")
  if stage not in stages:
    raise ValueError(f"stage ({stage!r}) must be one of {stages}.")
  config = base.get_config()
  config.data.synthetic.num_problems = 12_000
  config.data.synthetic.difficulty = 1
  config.data.synthetic.kinds = ("bar_max", "color")
  config.data.synthetic.image_size = 48
  config.data.synthetic.multi_choice_share = 0.0
  config.data.synthetic.min_options = 3
  config.data.synthetic.max_options = 4
  # Synthetic prompts fit the first; real questions need the others.
  config.data.prompt_buckets = (44, 256, 512, 1024)
  config.model.weights = "random:0"
  config.model.compute_dtype = "float32"
  config.model.train_vision = True
  config.model.vision_remat = "none"  # The tower is small.
  config.rollout.max_new_tokens = 6
  config.rollout.pictures_per_shard = 64
  config.eval.num_problems = 512
  config.eval.batch_size = 256
  config.samples.every_steps = 20
  config.checkpoint.every_steps = 50
  # With a format reward, a group that is all right or all wrong would differ by
  # style alone. Scaled to a full advantage, that style would crowd out the
  # right answers, which are still rare.
  config.rewards.preset = "answer"
  config.rewards.format = 0.0
  config.rewards.num_workers = 0
  config.optimizer.schedule = "linear"
  config.data.prompts_per_step = 64
  config.train.microbatch_bundles = 16
  if stage == "warm_start":
    config.data.kind = "demonstrations"
    config.train.num_steps = 22
    config.eval.every_steps = 22
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 5
  elif stage == "reward_model":
    config.data.kind = "preference"
    config.objective.preset = "bradley_terry"
    # As the policy of this config writes. Reasoning would give the answer away
    # without the picture.
    config.data.preference_reasoning = False
    # A right answer and up to three wrong ones: more pairs for one picture.
    config.data.preference_completions = 4
    config.train.num_steps = 120
    config.train.microbatch_bundles = 64
    config.eval.every_steps = 30
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 5
  else:
    config.train.num_steps = 100
    config.eval.every_steps = 25
    # A prompt and its image are computed once, so more completions are cheap.
    # They make the advantages far less noisy.
    config.rollout.num_generations = 16
    config.optimizer.learning_rate = 3e-4
  return config
