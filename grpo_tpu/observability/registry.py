"""Every number that a run reports: its name, its unit, and what to make of it.

`METRICS` is the one place where a metric is named. `docs/metrics.md` is made of
it, `grpo_tpu/observability/dashboard.py` says on which chart each stands, and a
name that is not here cannot be written.
"""

import dataclasses
import difflib
import re

_ANY_WORD = r"[\w.-]+"


@dataclasses.dataclass(frozen=True)
class Metric:
  """One row of the table.

  Attributes:
    name: As in `metrics.jsonl`. `{slice}` in it stands for any one word.
    unit: "1" where it has none.
    meaning: What is measured, over what.
    advice: What to make of it when it moves, and what to do.
  """

  name: str
  unit: str
  meaning: str
  advice: str

  @property
  def pattern(self) -> str:
    """A regular expression for the names that the row stands for, whole."""
    return re.escape(self.name).replace(r"\{slice\}", _ANY_WORD)


_REWARDS = ("accuracy", "format", "length", "reasoning_words", "coherence")
_HEURISTICS_RISE = (
  "rising while `eval/accuracy` does not: it is being earned for itself; lower "
  "its weight"
)
_WATCH_KL = "beyond 0.1 or so: the policy is leaving its start; see `train/kl`"

METRICS = (
  # What the update did. Means are over the tokens the loss is taken over.
  Metric(
    "train/loss",
    "1",
    "what the gradient descends",
    "no measure of progress: it stays near 0 with advantages that add up to "
    "0. Not finite: see `train/skipped_updates`",
  ),
  Metric(
    "train/kl",
    "nats",
    "the KL term before beta",
    "slow growth is learning. A jump: lower `optimizer.learning_rate`; growth "
    "without accuracy: raise `objective.beta`",
  ),
  Metric(
    "train/kl_k1", "nats", "policy from reference, by estimator k1", _WATCH_KL
  ),
  Metric("train/kl_k2", "nats", "the same by k2", _WATCH_KL),
  Metric("train/kl_k3", "nats", "the same by k3", _WATCH_KL),
  Metric(
    "train/old_kl",
    "nats",
    "policy from the one that sampled, by k3",
    "grows with the updates on one batch: lower `train.num_iterations` or "
    "`optimizer.learning_rate`",
  ),
  Metric(
    "train/entropy",
    "nats",
    "of the policy's next token",
    "to 0: it has settled, and samples no alternatives; raise "
    "`objective.epsilon_high` or `shaping.entropy_bonus`. Upwards without end: "
    "it is coming apart; lower the learning rate",
  ),
  Metric(
    "train/ratio",
    "1",
    "policy over the one that sampled",
    "away from 1: many updates on one batch, or sampler and trainer disagree",
  ),
  Metric(
    "train/sampler_weight",
    "1",
    "correction for the sampler, capped",
    "well below 1: the cap `objective.tis_cap` is at work; see "
    "`train/sampler_logp_difference_mean`",
  ),
  Metric(
    "train/effective_sample_share",
    "share",
    "of tokens that the ratios' spread leaves (Kish)",
    "below 0.3: a few tokens outweigh the rest; lower "
    "`optimizer.learning_rate` or `train.num_iterations`",
  ),
  Metric(
    "train/clip_fraction",
    "share",
    "of tokens that the clip holds",
    "above 0.5: the policy is far from the one that sampled; as for "
    "`train/effective_sample_share`",
  ),
  Metric(
    "train/clip_fraction_low",
    "share",
    "held from below",
    "more than `_high`: mostly bad tokens are being pushed down",
  ),
  Metric(
    "train/clip_fraction_high",
    "share",
    "held from above",
    "high with falling entropy: raise `objective.epsilon_high`",
  ),
  Metric(
    "train/clip_fraction_dual",
    "share",
    "held by the dual clip",
    "above 0 often: single tokens have run far away; lower the learning rate",
  ),
  Metric(
    "train/grad_norm",
    "1",
    "of all gradients, before clipping",
    "spikes are clipped by `optimizer.max_grad_norm`; growing for long: lower "
    "`optimizer.learning_rate`. 0: no group has a spread of rewards",
  ),
  Metric(
    "train/learning_rate",
    "1",
    "of this update",
    "follows `optimizer.schedule`, nothing else",
  ),
  Metric(
    "train/skipped_updates",
    "count",
    "of this step, whose gradient was not finite",
    "above 0: look at the step's samples, lower `optimizer.learning_rate`; "
    "`train.max_skipped_updates` in a row end the run",
  ),
  Metric(
    "train/tokens",
    "tokens",
    "that the loss is taken over",
    "follows `rollout/completion_length`; falls where shaping drops groups",
  ),
  Metric(
    "train/sampler_logp_difference_mean",
    "nats",
    "from the sampler's, absolute",
    "above 0.05: sampler and trainer disagree about the same tokens; set "
    "`objective.tis_cap=2.0`, or `model.compute_dtype=float32`",
  ),
  Metric(
    "train/sampler_logp_difference_max",
    "nats",
    "of any token",
    "single large ones are rounding in bf16; all the time: as for the mean",
  ),
  Metric(
    "train/sampler_kl",
    "nats",
    "sampler from policy, by k3",
    "should stay near 0: as for `train/sampler_logp_difference_mean`",
  ),
  Metric(
    "train/nll",
    "nats",
    "of demonstrations",
    "falls. To 0: they are known by heart; stop the warm start earlier",
  ),
  Metric(
    "train/preference_accuracy",
    "share",
    "chosen paid more; ties half",
    "is of the data and the rewards, not of the policy: below 0.9 the rewards "
    "do not agree with the labels",
  ),
  Metric(
    "train/implicit_preference_accuracy",
    "share",
    "chosen gained more",
    "should rise from 0.5; far above the held-out one: overfitted",
  ),
  Metric(
    "train/implicit_preference_margin",
    "nats",
    "by how much more",
    "growing without end: raise `objective.beta`, or stop",
  ),
  # What the policy sampled.
  Metric(
    "rollout/reward",
    "1",
    "weighted total, mean over completions",
    "should rise together with `eval/accuracy`; alone, it is being gamed "
    "([reading the curves](reading-the-curves.md))",
  ),
  Metric(
    "rollout/reward_std",
    "1",
    "within a group, mean over groups",
    "to 0: groups agree, and nothing is left to learn from; other problems, a "
    "higher `rollout.temperature`, or more `rollout.num_generations`",
  ),
  Metric(
    "rollout/accuracy",
    "share",
    "of completions that are right",
    "the one to believe, next to `eval/accuracy`. Falling: the policy is "
    "losing what it knew; go back a checkpoint, lower the learning rate",
  ),
  Metric(
    "rollout/unanimous_fraction",
    "share",
    "of groups all paid the same",
    "above 0.8: most of the rollout teaches nothing; "
    "`shaping.zero_variance=resample`",
  ),
  Metric(
    "rollout/all_right_fraction",
    "share",
    "of groups all right",
    "above 0.9: take harder problems",
  ),
  Metric(
    "rollout/all_wrong_fraction",
    "share",
    "of groups all wrong",
    "above 0.9: a warm start, a stronger model, easier problems, or more "
    "`rollout.num_generations`",
  ),
  Metric(
    "rollout/mixed_fraction",
    "share",
    "of groups neither",
    "these are what accuracy is learnt from: below 0.1 progress is slow",
  ),
  Metric(
    "rollout/prompt_length",
    "tokens",
    "mean, image tokens included",
    "is of the data: it changes with them alone",
  ),
  Metric(
    "rollout/padded_prompt_length",
    "tokens",
    "of the step's bucket",
    "far above `rollout/prompt_length`: add a bucket to `data.prompt_buckets`",
  ),
  Metric(
    "rollout/completion_length",
    "tokens",
    "mean, end of turn included",
    "growing without accuracy: padding is paid; look at `reward/length_mean`, "
    "or use the `dr_grpo` preset. Collapsing: it answers without thinking",
  ),
  Metric(
    "rollout/truncated_fraction",
    "share",
    "of completions cut off",
    "above 0.5: raise `rollout.max_new_tokens`, or "
    "`shaping.truncated=penalise`",
  ),
  Metric(
    "rollout/length_penalty",
    "1",
    "added to the reward, mean",
    "should return to 0 as completions learn to end",
  ),
  Metric(
    "rollout/batches",
    "count",
    "sampled to fill the step's groups",
    "at `shaping.max_batches`: groups with a spread are rare; see "
    "`rollout/unanimous_fraction`",
  ),
  Metric(
    "rollout/effective_sample_size",
    "completions",
    "that the advantages rest on (Kish)",
    "small: a few completions make the gradient; more "
    "`data.prompts_per_step`, or `shaping.advantage_clip`",
  ),
  Metric(
    "rollout/heuristic_advantage_share",
    "share",
    "of the advantages that the heuristic rewards make",
    "above 0.5: it learns how to write, not what to answer; lower "
    "`rewards.length`, `rewards.reasoning_words`, `rewards.coherence`",
  ),
  # What each reward said of the completions, before its weight.
  *(
    Metric(
      f"reward/{reward}_{statistic}",
      "1",
      f"{statistic} of `{reward}`",
      {
        "accuracy": "the share that the verifier finds right, where it is "
        "paid 1; see `rollout/accuracy`",
        "format": "low: completions lack their one `<answer>`; a warm start "
        "teaches it in a few steps",
      }.get(reward, _HEURISTICS_RISE)
      if statistic == "mean"
      else "to 0: it tells no completion from another any more",
    )
    for reward in _REWARDS
    for statistic in ("mean", "std")
  ),
  *(
    Metric(f"reward/{{slice}}_{statistic}", "1", f"{statistic} of a user's", x)
    for statistic, x in (
      ("mean", "rising while `eval/accuracy` does not: lower its weight"),
      ("std", "to 0: it tells no completion from another any more"),
    )
  ),
  Metric(
    "reward/errors",
    "count",
    "failures of any reward",
    "above 0: the log has the first; more than `rewards.max_error_fraction` "
    "end the run",
  ),
  Metric(
    "reward/{slice}_errors",
    "count",
    "completions that it failed on",
    "mend that reward; its rows are left out meanwhile, and paid nothing",
  ),
  # How the policy does on held-out problems, decoded greedily.
  Metric(
    "eval/accuracy",
    "share",
    "of problems answered rightly",
    "the figure that the run is for. Flat while `rollout/reward` rises: the "
    "reward is being gamed. Falling: stop, and take the best checkpoint",
  ),
  Metric(
    "eval/accuracy/{slice}",
    "share",
    "the same of one sort of problem",
    "one sort falls while the rest rise: it is rare in the training data",
  ),
  Metric(
    "eval/format",
    "share",
    "of completions in the format asked for",
    "below 0.9: part of the wrong answers are only unreadable",
  ),
  Metric(
    "eval/reward",
    "1",
    "weighted total, mean over completions",
    "far below `rollout/reward`: overfitted to the training problems",
  ),
  Metric(
    "eval/completion_length",
    "tokens",
    "mean, end of turn included",
    "as for `rollout/completion_length`",
  ),
  Metric(
    "eval/truncated_fraction",
    "share",
    "of completions cut off",
    "as for `rollout/truncated_fraction`; cut-off answers count as wrong",
  ),
  Metric(
    "eval/preference_accuracy",
    "share",
    "chosen paid more; ties half",
    "is of the data and the rewards: it moves with them alone",
  ),
  Metric(
    "eval/implicit_preference_accuracy",
    "share",
    "chosen gained more",
    "should rise from 0.5; when it turns, stop",
  ),
  Metric(
    "eval/implicit_preference_accuracy/{slice}",
    "share",
    "the same of pairs whose rewards are that far apart",
    "near pairs are harder: they stay lower",
  ),
  Metric(
    "eval/implicit_preference_accuracy_per_token",
    "share",
    "the same by the mean over tokens, which length does not enter",
    "far from the other: it is lengths that are being learnt",
  ),
  Metric(
    "eval/implicit_preference_margin",
    "nats",
    "by how much more",
    "growing while the accuracy does not: it is only growing surer",
  ),
  # Where in the data the run is.
  Metric(
    "data/epoch",
    "epochs",
    "passes over the training split begun",
    "many: compare `rollout/accuracy` with `eval/accuracy` for overfitting",
  ),
  Metric(
    "data/skipped",
    "count",
    "records of this step that were unusable",
    "above 0 often: prompts longer than the last of `data.prompt_buckets`, or "
    "pictures that cannot be read; the log names them",
  ),
  # Wall-clock time: these alone differ between two runs of one seed.
  Metric(
    "perf/step_seconds",
    "s",
    "the whole step",
    "jumps: see `perf/compile_seconds` and the parts below",
  ),
  Metric(
    "perf/data_seconds",
    "s",
    "waiting for the batch",
    "more than a little: raise `data.worker_processes`",
  ),
  Metric(
    "perf/rollout_seconds",
    "s",
    "sampling",
    "most of a step, as a rule; grows with `rollout/completion_length`",
  ),
  Metric(
    "perf/pictures_seconds",
    "s",
    "in it, encoding pictures",
    "large with a frozen tower: raise `rollout.image_cache_mib`",
  ),
  Metric(
    "perf/pictures_encoded",
    "count",
    "that differ and were not cached",
    "does not fall in the second epoch: `rollout.image_cache_mib` is too small",
  ),
  Metric(
    "perf/prefill_seconds",
    "s",
    "in it, reading prompts",
    "follows `rollout/padded_prompt_length`",
  ),
  Metric(
    "perf/decode_seconds",
    "s",
    "in it, all tokens but the first",
    "follows the longest completion of the step",
  ),
  Metric(
    "perf/rollout_tokens_per_second",
    "tokens/s",
    "reading and decoding alone",
    "falls as completions grow, since caches do",
  ),
  Metric(
    "perf/live_row_share",
    "share",
    "of rows decoded, had not ended",
    "low: a few long completions hold up the rest; a smaller "
    "`rollout.chunk_tokens` moves rows together more often",
  ),
  Metric(
    "perf/compactions",
    "count",
    "times that rows moved together",
    "0 with a low `perf/live_row_share`: lower `rollout.chunk_tokens`",
  ),
  Metric(
    "perf/decode_bytes",
    "B",
    "least to be read: weights, caches of live rows",
    "is work, not time: it follows lengths and rows",
  ),
  Metric(
    "perf/decode_bandwidth_share",
    "share",
    "of the chips', by those bytes",
    "falling at the same lengths: look at a profile (`profile.steps`)",
  ),
  Metric(
    "perf/reward_seconds",
    "s",
    "scoring completions, after sampling",
    "large: raise `rewards.num_workers`, or mend a slow reward",
  ),
  Metric(
    "perf/reward_overlap_seconds",
    "s",
    "scoring them while sampling",
    "costs no time of the step",
  ),
  Metric(
    "perf/update_seconds",
    "s",
    "gradients and optimizer",
    "large: a larger `train.microbatch_bundles`, or less `model.remat`; "
    "[the plan](plan.md) says what fits",
  ),
  Metric("perf/eval_seconds", "s", "evaluating", "raise `eval.every_steps`"),
  Metric(
    "perf/checkpoint_block_seconds",
    "s",
    "training held up by a save",
    "large: saves come faster than the disk writes; raise "
    "`checkpoint.every_steps`",
  ),
  Metric(
    "perf/tokens_per_second",
    "tokens/s",
    "completion tokens, whole step",
    "the figure to compare settings by, at the same lengths",
  ),
  Metric(
    "perf/compile_seconds",
    "s",
    "compiling, in this step",
    "0 after the second step; else a shape has come that was not foreseen",
  ),
  Metric(
    "perf/compilations",
    "count",
    "programs compiled in this step",
    "as for `perf/compile_seconds`",
  ),
  Metric(
    "perf/slowest_host",
    "index",
    "whose own work took longest",
    "the same for long: look at that host's log, disk and neighbours",
  ),
  Metric(
    "perf/straggler_seconds",
    "s",
    "by which it exceeds the median host",
    "all hosts wait for it: replace the host if it stays",
  ),
  Metric(
    "perf/write_failures",
    "count",
    "since this process started",
    "above 0: the disk of the workdir is full or gone; the log says which file",
  ),
  # Shares of `perf/run_seconds`, the run's wall time over all its restarts.
  *(
    Metric(f"perf/goodput_{phase}", "share", meaning, advice)
    for phase, meaning, advice in (
      ("data", "waiting for a batch", "see `perf/data_seconds`"),
      ("rollout", "sampling", "with `_update`, what the time should go into"),
      ("reward", "scoring completions", "see `perf/reward_seconds`"),
      (
        "update",
        "gradients and optimizer",
        "with `_rollout`, what the time should go into",
      ),
      (
        "compile",
        "compiling",
        "falls as the run goes on; keep `compilation_cache_dir` where a "
        "restart finds it",
      ),
      ("evaluate", "evaluating", "raise `eval.every_steps`"),
      (
        "checkpoint",
        "held up by a save",
        "see `perf/checkpoint_block_seconds`",
      ),
      (
        "restart",
        "from a process's last step to the next one's first",
        "high: preempted often, or slow to start; "
        "[preemption](preemption-and-failures.md)",
      ),
      (
        "lost",
        "steps that a later process did again",
        "high: killed without notice; lower `checkpoint.every_steps`",
      ),
      ("other", "none of these", "above 0.1: look at a profile"),
    )
  ),
  Metric(
    "perf/run_seconds",
    "s",
    "since the run was first started",
    "the wall time, over all restarts",
  ),
  Metric(
    "perf/unix_seconds",
    "s",
    "since 1970, when the line was written",
    "a clock; gaps are restarts",
  ),
  # Of this process since it started: these differ between two runs too.
  Metric(
    "checkpoint/save_failures",
    "count",
    "saves that came to nothing",
    "above 0: disk or bucket; `checkpoint.max_failures` in a row end the run",
  ),
  Metric(
    "checkpoint/refused_not_finite",
    "count",
    "of them, of a NaN state",
    "above 0: the state is spoilt; go back to the newest checkpoint with a "
    "lower learning rate",
  ),
  Metric(
    "checkpoint/quarantined",
    "count",
    "damaged ones, moved aside",
    "above 0: a disk that flips bits; [checkpoints](checkpoints.md)",
  ),
)

_ORDER = {metric.name: index for index, metric in enumerate(METRICS)}
_TEMPLATES = tuple(
  (re.compile(metric.pattern), index)
  for index, metric in enumerate(METRICS)
  if "{slice}" in metric.name
)


def is_declared(name: str) -> bool:
  """Whether `METRICS` has a row for it."""
  is_sliced = any(template.fullmatch(name) for template, _ in _TEMPLATES)
  return is_sliced or (name in _ORDER and "{" not in name)


def row_index(name: str) -> int:
  """Where in `METRICS` a name stands.

  Raises:
    ValueError: Nowhere; with the name that may have been meant.
  """
  if name in _ORDER and "{" not in name:
    return _ORDER[name]
  for template, index in _TEMPLATES:
    if template.fullmatch(name):
      return index
  close = difflib.get_close_matches(name, _ORDER, n=1)
  raise ValueError(
    f"metric {name!r} is not declared: give it a row in"
    " grpo_tpu/observability/registry.py:METRICS"
    + (f", or write {close[0]!r}." if close else ".")
  )


def page() -> str:
  """`docs/metrics.md`: the table as Markdown, a section for each prefix."""
  sections: dict[str, list[str]] = {}
  for metric in METRICS:
    cells = (f"`{metric.name}`", metric.unit, metric.meaning, metric.advice)
    row = " | ".join(cell.replace("|", r"\|") for cell in cells)
    sections.setdefault(metric.name.split("/")[0], []).append(f"| {row} |")
  body = "\n\n".join(
    "\n".join(
      (
        f"## {prefix}",
        "",
        "| name | unit | what it is | when it moves |",
        "|:--|:--|:--|:--|",
        *rows,
      )
    )
    for prefix, rows in sections.items()
  )
  return f"{_PREFACE}\n{body}\n"


_PREFACE = """\
# Metrics

Every number that a run writes to `metrics.jsonl` and to TensorBoard. `{slice}`
stands for one word: the sort of a problem, or the name of a reward of your own.
What `train/` and `rollout/` say is of one step; only `perf/` and `checkpoint/`
differ between two runs of one seed. The alarms that the log raises by itself
are in `grpo_tpu/observability/alarms.py`; how to read several curves together
is in [reading the curves](reading-the-curves.md).

This page is made of `grpo_tpu/observability/registry.py`, by
`python -m grpo_tpu.observability.registry > docs/metrics.md`; a test holds it.
"""

if __name__ == "__main__":
  import sys

  sys.stdout.write(page())
