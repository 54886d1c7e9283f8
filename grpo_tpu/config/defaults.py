"""The default of every setting; `configs/` says what differs for a run."""

from typing import Any

import ml_collections
from ml_collections import config_dict

# Online GRPO on synthetic problems, for one TPU host of any kind. A type stands
# for None, which a config or a flag may change to a value of that type.
_DEFAULTS = dict(
  seed=0,
  compilation_cache_dir="~/.cache/grpo_tpu/compiled",
  data=dict(
    kind="online",
    dir="",  # The synthetic set, under the workdir.
    dirs=(),
    tokenizer="",  # The small one in the data dir.
    synthetic=dict(
      num_problems=10_000,
      seed=0,
      difficulty=2,
      kinds=(
        *("color", "shape", "count", "bar_value", "bar_max", "table_value"),
        *("clock_time", "dot_total"),
      ),
      image_size=96,
      multi_choice_share=0.25,
      min_options=2,
      max_options=8,
    ),
    synthetic_eval_fraction=0.1,
    train_split="train",
    eval_split="eval",
    worker_processes=0,
    prompts_per_step=64,
    prompt_buckets=(384, 512, 1024, 2048),
    images_per_prompt=1,
    prompt_template="tagged",
    system_prompt="",
    few_shot=0,
    shuffle_options=False,
    pan_and_scan=dict(
      enabled=False,
      min_crop_size=256,
      max_num_crops=4,
      min_ratio_to_activate=1.2,
    ),
    # For kind "preference".
    preference_completions=2,
    preference_file="",
    preference_kinds=("distractor", "perturbation"),
    preference_reasoning=True,
    preference_rewards="functions",
    accept_mathvista_training_terms=False,
  ),
  model=dict(
    name="tiny",
    image_size=int,  # The tower's own.
    head="",  # That of the objective.
    weights="",  # None are drawn unasked.
    param_dtype="float32",
    compute_dtype="bfloat16",
    attention="auto",
    remat="full",
    train_vision=False,
    vision_remat="full",
    lora=dict(
      rank=0,  # The whole model.
      alpha=32.0,
      targets=("q", "kv", "output", "gating", "linear", "projector"),
      init="",
    ),
    reference_dtype=str,
    reference_memory="device",
    logits_chunk=1024,
  ),
  mesh=dict(replica=1, fsdp=1, tensor=1),
  distributed=dict(
    initialization_timeout_seconds=300,
    heartbeat_timeout_seconds=60,
    shutdown_timeout_seconds=60,
    preflight_timeout_seconds=120,
    watchdog_seconds=1800.0,
    watchdog_start_seconds=3600.0,
  ),
  rollout=dict(
    num_generations=8,
    max_new_tokens=1024,
    min_new_tokens=0,
    temperature=1.0,
    stop_strings=(),
    chunk_tokens=128,
    prompts_at_a_time=int,
    pictures_per_shard=8,
    image_cache_mib=0,
  ),
  rewards=dict(
    # None takes the preset's value, here and in the objective.
    preset="gated",
    accuracy=float,
    format=float,
    length=float,
    reasoning_words=float,
    coherence=float,
    gate_heuristics=bool,
    custom=(),  # As in ("package.module:function",).
    custom_weights=(),
    models=(),  # As in (("run:WORKDIR", 1.0),).
    model_normalization="reference",
    spread_penalty=0.0,
    judges=(),  # As in (("self", "agreement", 1.0),).
    judge_vote="mean",
    judge_when="always",
    network_dtype=str,
    network_memory="device",
    only_if_accurate=(),
    max_concurrent=32,
    max_retries=2,
    num_workers=4,
    worker_memory_gib=8.0,
    rows_per_call=16,
    timeout_seconds=5.0,
    max_error_fraction=0.1,
    error_window=1000,
  ),
  objective=dict(
    preset="dapo",
    teacher="",
    reward_aggregation="sum_then_normalize",
    advantage_scale=str,
    advantage_baseline="mean",
    aggregation=str,
    importance=str,
    surrogate=str,
    epsilon_low=float,
    epsilon_high=float,
    dual_clip=float,
    beta=float,
    kl_estimator=str,
    kl_gradient=str,
    tis_cap=float,
    max_completion_length=int,
    pairs=dict(label_smoothing=0.0, centering=0.01, margin=0.0, ties=False),
  ),
  shaping=dict(
    truncated="keep",
    soft_tokens=128,
    zero_variance="keep",
    max_batches=3,
    advantage_clip=float,
    top_entropy_share=1.0,
    entropy_bonus=0.0,
    sampler_correction="token",
    sampler_ratio_bounds=(),  # As in (0.5, 2.0).
    off_policy_bound=float,
  ),
  optimizer=dict(
    learning_rate=1e-6,
    schedule="constant",
    warmup_steps=0,
    end_fraction=0.1,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.0,
    max_grad_norm=1.0,
  ),
  train=dict(
    num_steps=1000,
    num_iterations=1,
    microbatch_bundles=8,
    max_skipped_updates=10,
    stop_when="",  # As in "eval/accuracy >= 0.95".
  ),
  checkpoint=dict(
    every_steps=50,
    every_minutes=0.0,
    keep=3,
    best_metric="",  # As in "eval/accuracy".
    best_mode="max",
    keep_best=1,
    max_failures=3,
    timeout_seconds=600,
    accept_changes=False,
  ),
  eval=dict(
    every_steps=50,
    sets=(),  # As in (("mathvista", "/data/mathvista", "testmini"),).
    num_problems=1000,
    batch_size=64,
    num_samples=0,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    ks=(),
    # The rest is for --mode=evaluate alone.
    ablations=("removed", "shuffled"),
    num_examples=24,
  ),
  samples=dict(every_steps=10, count=4),
  profile=dict(steps=()),
  # For --mode=export alone.
  export=dict(step=str, dtype="bfloat16", tokenizer_dir="", adapter=False),
)


def get_config() -> ml_collections.ConfigDict:
  """The defaults, for a config file to change."""
  return ml_collections.ConfigDict(_with_placeholders(_DEFAULTS))


def _with_placeholders(value: Any) -> Any:
  """New placeholders for the types; two configs must not share one."""
  if isinstance(value, dict):
    return {name: _with_placeholders(each) for name, each in value.items()}
  return config_dict.placeholder(value) if isinstance(value, type) else value
