"""The default of every setting; `configs/` says what differs for a run."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  """Online GRPO on synthetic problems, for one TPU host of any kind."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.compilation_cache_dir = "~/.cache/grpo_tpu/compiled"

  config.data = ml_collections.ConfigDict()
  config.data.kind = "online"
  config.data.dir = ""  # The synthetic set, under the workdir.
  config.data.tokenizer = ""  # The small one in the data dir.
  config.data.synthetic = ml_collections.ConfigDict()
  config.data.synthetic.num_problems = 10_000
  config.data.synthetic.seed = 0
  config.data.synthetic.difficulty = 2
  config.data.synthetic.kinds = (
    *("color", "shape", "count", "bar_value", "bar_max", "table_value"),
    *("clock_time", "dot_total"),
  )
  config.data.synthetic.image_size = 96
  config.data.synthetic.multi_choice_share = 0.25
  config.data.synthetic.min_options = 2
  config.data.synthetic.max_options = 8
  config.data.synthetic_eval_fraction = 0.1
  config.data.train_split = "train"
  config.data.eval_split = "eval"
  config.data.worker_processes = 0
  config.data.prompts_per_step = 64
  config.data.prompt_buckets = (384, 512, 1024, 2048)
  config.data.prompt_template = "tagged"
  config.data.shuffle_options = False
  config.data.pan_and_scan = ml_collections.ConfigDict()
  config.data.pan_and_scan.enabled = False
  config.data.pan_and_scan.min_crop_size = 256
  config.data.pan_and_scan.max_num_crops = 4
  config.data.pan_and_scan.min_ratio_to_activate = 1.2
  # For kind "preference".
  config.data.preference_completions = 2
  config.data.preference_file = ""
  config.data.preference_kinds = ("distractor", "perturbation")
  config.data.preference_rewards = "functions"
  config.data.accept_mathvista_training_terms = False

  config.model = ml_collections.ConfigDict()
  config.model.name = "tiny"
  config.model.image_size = config_dict.placeholder(int)  # The tower's own.
  config.model.weights = "random:0"
  config.model.param_dtype = "float32"
  config.model.compute_dtype = "bfloat16"
  config.model.attention = "auto"
  config.model.remat = "full"
  config.model.train_vision = False
  config.model.vision_remat = "full"
  config.model.lora = ml_collections.ConfigDict()
  config.model.lora.rank = 0  # The whole model.
  config.model.lora.alpha = 32.0
  config.model.lora.targets = (
    *("q", "kv", "output", "gating", "linear", "projector"),
  )
  config.model.reference_dtype = config_dict.placeholder(str)
  config.model.reference_memory = "device"
  config.model.logits_chunk = 1024

  config.mesh = ml_collections.ConfigDict()
  config.mesh.replica = 1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.distributed = ml_collections.ConfigDict()
  config.distributed.initialization_timeout_seconds = 300
  config.distributed.heartbeat_timeout_seconds = 60
  config.distributed.shutdown_timeout_seconds = 60
  config.distributed.preflight_timeout_seconds = 120
  config.distributed.watchdog_seconds = 1800.0
  config.distributed.watchdog_start_seconds = 3600.0

  config.rollout = ml_collections.ConfigDict()
  config.rollout.num_generations = 8
  config.rollout.max_new_tokens = 1024
  config.rollout.min_new_tokens = 0
  config.rollout.temperature = 1.0
  config.rollout.stop_strings = ()
  config.rollout.chunk_tokens = 128
  config.rollout.prompts_at_a_time = config_dict.placeholder(int)
  config.rollout.pictures_per_shard = 8
  config.rollout.image_cache_mib = 0

  config.rewards = ml_collections.ConfigDict()
  # None takes the preset's value, here and in the objective.
  config.rewards.preset = "gated"
  config.rewards.accuracy = config_dict.placeholder(float)
  config.rewards.format = config_dict.placeholder(float)
  config.rewards.length = config_dict.placeholder(float)
  config.rewards.reasoning_words = config_dict.placeholder(float)
  config.rewards.coherence = config_dict.placeholder(float)
  config.rewards.gate_heuristics = config_dict.placeholder(bool)
  config.rewards.custom = ()  # As in ("package.module:function",).
  config.rewards.custom_weights = ()
  config.rewards.num_workers = 4
  config.rewards.rows_per_call = 16
  config.rewards.timeout_seconds = 5.0
  config.rewards.max_error_fraction = 0.1
  config.rewards.error_window = 1000

  config.objective = ml_collections.ConfigDict()
  config.objective.preset = "dapo"
  config.objective.advantage_scale = config_dict.placeholder(str)
  config.objective.advantage_baseline = "mean"
  config.objective.aggregation = config_dict.placeholder(str)
  config.objective.importance = config_dict.placeholder(str)
  config.objective.surrogate = config_dict.placeholder(str)
  config.objective.epsilon_low = config_dict.placeholder(float)
  config.objective.epsilon_high = config_dict.placeholder(float)
  config.objective.dual_clip = config_dict.placeholder(float)
  config.objective.beta = config_dict.placeholder(float)
  config.objective.kl_estimator = config_dict.placeholder(str)
  config.objective.kl_gradient = config_dict.placeholder(str)
  config.objective.tis_cap = config_dict.placeholder(float)
  config.objective.max_completion_length = config_dict.placeholder(int)

  config.shaping = ml_collections.ConfigDict()
  config.shaping.truncated = "keep"
  config.shaping.soft_tokens = 128
  config.shaping.zero_variance = "keep"
  config.shaping.max_batches = 3
  config.shaping.advantage_clip = config_dict.placeholder(float)
  config.shaping.top_entropy_share = 1.0
  config.shaping.entropy_bonus = 0.0
  config.shaping.sampler_correction = "token"

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.learning_rate = 1e-6
  config.optimizer.schedule = "constant"
  config.optimizer.warmup_steps = 0
  config.optimizer.end_fraction = 0.1
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.99
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 0.0
  config.optimizer.max_grad_norm = 1.0

  config.train = ml_collections.ConfigDict()
  config.train.num_steps = 1000
  config.train.num_iterations = 1
  config.train.microbatch_bundles = 8
  config.train.max_skipped_updates = 10

  config.checkpoint = ml_collections.ConfigDict()
  config.checkpoint.every_steps = 50
  config.checkpoint.every_minutes = 0.0
  config.checkpoint.keep = 3
  config.checkpoint.best_metric = ""  # As in "eval/accuracy".
  config.checkpoint.best_mode = "max"
  config.checkpoint.keep_best = 1
  config.checkpoint.max_failures = 3
  config.checkpoint.timeout_seconds = 600
  config.checkpoint.accept_changes = False

  config.eval = ml_collections.ConfigDict()
  config.eval.every_steps = 50
  config.eval.num_problems = 1000
  config.eval.batch_size = 64
  # The rest is for --mode=evaluate alone.
  config.eval.num_samples = 0
  config.eval.temperature = 1.0
  config.eval.top_k = 0
  config.eval.top_p = 1.0
  config.eval.ks = (1, 8)
  config.eval.ablations = ("removed", "shuffled")
  config.eval.num_examples = 24

  config.samples = ml_collections.ConfigDict()
  config.samples.every_steps = 10
  config.samples.count = 4

  config.profile = ml_collections.ConfigDict()
  config.profile.steps = ()  # As in (10, 12), inclusive.

  # For --mode=export alone.
  config.export = ml_collections.ConfigDict()
  config.export.step = config_dict.placeholder(int)
  config.export.dtype = "bfloat16"
  config.export.tokenizer_dir = ""
  config.export.adapter = False
  return config
