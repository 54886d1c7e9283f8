"""TensorBoard's Custom Scalars tab: charts by the question they answer.

Every metric of `metric_table` stands on a chart. The layout travels in the
event files, so nobody has to set anything up to see it.
"""

import dataclasses
from typing import Any

from grpo_tpu.observability import registry


@dataclasses.dataclass(frozen=True)
class Chart:
  """Curves that are read together.

  Attributes:
    title: Above the chart; one of its section.
    names: Of metrics, as `metric_table` has them.
  """

  title: str
  names: tuple[str, ...]


SECTIONS = {
  "Learning": (
    Chart("accuracy", ("eval/accuracy", "rollout/accuracy")),
    Chart("reward", ("rollout/reward", "eval/reward")),
    Chart("held-out accuracy by sort of problem", ("eval/accuracy/{slice}",)),
    Chart("loss", ("train/loss", "train/nll")),
    Chart("learning rate", ("train/learning_rate",)),
    Chart("passes over the data", ("data/epoch",)),
    Chart(
      "preferences",
      (
        "train/preference_accuracy",
        "train/implicit_preference_accuracy",
        "eval/preference_accuracy",
        "eval/implicit_preference_accuracy",
        "eval/implicit_preference_accuracy_per_token",
        "eval/implicit_preference_accuracy/{slice}",
      ),
    ),
    Chart(
      "preference margins",
      (
        "train/implicit_preference_margin",
        "eval/implicit_preference_margin",
      ),
    ),
  ),
  "Reward health": (
    Chart(
      "advantage made by heuristics", ("rollout/heuristic_advantage_share",)
    ),
    Chart("each reward, before its weight", ("reward/{slice}_mean",)),
    Chart("spread of each reward", ("reward/{slice}_std",)),
    Chart(
      "groups",
      (
        "rollout/mixed_fraction",
        "rollout/all_right_fraction",
        "rollout/all_wrong_fraction",
        "rollout/unanimous_fraction",
      ),
    ),
    Chart("spread of rewards in a group", ("rollout/reward_std",)),
    Chart("answers in the format asked for", ("eval/format",)),
    Chart("failures of rewards", ("reward/errors", "reward/{slice}_errors")),
  ),
  "Rollout": (
    Chart(
      "length of completions",
      ("rollout/completion_length", "eval/completion_length"),
    ),
    Chart(
      "cut off",
      ("rollout/truncated_fraction", "eval/truncated_fraction"),
    ),
    Chart("entropy", ("train/entropy",)),
    Chart("length penalty", ("rollout/length_penalty",)),
    Chart(
      "length of prompts",
      ("rollout/prompt_length", "rollout/padded_prompt_length"),
    ),
    Chart("batches to fill a step", ("rollout/batches",)),
    Chart(
      "completions that the advantages rest on",
      ("rollout/effective_sample_size",),
    ),
    Chart("tokens of the loss", ("train/tokens",)),
    Chart("records skipped", ("data/skipped",)),
  ),
  "Stability": (
    Chart(
      "distance from the reference",
      ("train/kl", "train/kl_k1", "train/kl_k2", "train/kl_k3"),
    ),
    Chart("gradient norm", ("train/grad_norm",)),
    Chart(
      "held by the clip",
      (
        "train/clip_fraction",
        "train/clip_fraction_low",
        "train/clip_fraction_high",
        "train/clip_fraction_dual",
      ),
    ),
    Chart("distance from the policy that sampled", ("train/old_kl",)),
    Chart("ratio", ("train/ratio", "train/sampler_weight")),
    Chart("tokens that count", ("train/effective_sample_share",)),
    Chart(
      "sampler against trainer",
      (
        "train/sampler_logp_difference_mean",
        "train/sampler_logp_difference_max",
        "train/sampler_kl",
      ),
    ),
    Chart("updates skipped", ("train/skipped_updates",)),
    Chart(
      "saves and writes that failed",
      (
        "checkpoint/save_failures",
        "checkpoint/refused_not_finite",
        "checkpoint/quarantined",
        "perf/write_failures",
      ),
    ),
  ),
  "Performance": (
    Chart(
      "seconds of a step",
      (
        "perf/step_seconds",
        "perf/data_seconds",
        "perf/rollout_seconds",
        "perf/reward_seconds",
        "perf/update_seconds",
        "perf/eval_seconds",
        "perf/checkpoint_block_seconds",
        "perf/compile_seconds",
      ),
    ),
    Chart(
      "seconds of a rollout",
      (
        "perf/pictures_seconds",
        "perf/prefill_seconds",
        "perf/decode_seconds",
        "perf/reward_overlap_seconds",
      ),
    ),
    Chart(
      "tokens per second",
      ("perf/tokens_per_second", "perf/rollout_tokens_per_second"),
    ),
    Chart(
      "how full a rollout is",
      ("perf/live_row_share", "perf/decode_bandwidth_share"),
    ),
    Chart("bytes to read for a rollout", ("perf/decode_bytes",)),
    Chart(
      "times that something was done",
      (
        "perf/compilations",
        "perf/compactions",
        "perf/pictures_encoded",
      ),
    ),
    Chart("the slowest host's lag", ("perf/straggler_seconds",)),
    Chart("the slowest host", ("perf/slowest_host",)),
  ),
  "Goodput": (
    Chart(
      "where the time went",
      tuple(
        metric.name
        for metric in registry.METRICS
        if metric.name.startswith("perf/goodput_")
      ),
    ),
    Chart("seconds since the start", ("perf/run_seconds",)),
    Chart("clock", ("perf/unix_seconds",)),
  ),
}


def patterns(chart: Chart) -> list[str]:
  """Regular expressions for the names of a chart's curves, each whole."""
  rows = {metric.name: metric for metric in registry.METRICS}
  return [f"^{rows[name].pattern}$" for name in chart.names]


def write(events: Any, step: int) -> None:
  """Writes the layout with a CLU writer; that of the newest step is shown."""
  from tensorboard.plugins.custom_scalar import layout_pb2, metadata

  messages: Any = layout_pb2  # Made when it is imported, unseen by checkers.
  layout = messages.Layout(
    category=[
      messages.Category(
        title=title,
        chart=[
          messages.Chart(
            title=chart.title,
            multiline=messages.MultilineChartContent(tag=patterns(chart)),
          )
          for chart in charts
        ],
      )
      for title, charts in SECTIONS.items()
    ]
  )
  events.write_summaries(
    step,
    {metadata.CONFIG_SUMMARY_TAG: layout.SerializeToString()},
    {metadata.CONFIG_SUMMARY_TAG: metadata.create_summary_metadata()},
  )
