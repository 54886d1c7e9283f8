"""A GRPO step of this project, for `grpo_step.py`."""

import pathlib
import sys

# A script finds the packages of its own checkout only by this.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import dataclasses  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import step_workload as workload  # noqa: E402

from configs import base  # noqa: E402
from data_pipelines import pipeline, records  # noqa: E402
from grpo_tpu.checkpoint import load  # noqa: E402
from grpo_tpu.checkpoint.frozen import Frozen  # noqa: E402
from grpo_tpu.config import schema as run_config  # noqa: E402
from grpo_tpu.distributed import sharding
from grpo_tpu.models.gemma3 import config as gemma3_config  # noqa: E402
from grpo_tpu.rl import score  # noqa: E402
from grpo_tpu.rl.experience import Collector, Experience  # noqa: E402
from grpo_tpu.rl.learner import Learner  # noqa: E402
from grpo_tpu.rollout.sampler import Sampler  # noqa: E402


class Words:
  """A tokenizer whose text is ids; no id stops a completion.

  The sampler never writes the marks around an image. Here these marks are the
  stop ids, so every row has full length.
  """

  start_of_image, end_of_image = workload.EOS, workload.END_OF_TURN
  decode = staticmethod(workload.text)


def settings(args) -> run_config.Config:
  """The settings, with the sizes in place of those of "tiny"."""
  gemma3_config.CONFIGS["tiny"] = gemma3_config.ModelConfig(
    vocab_size=args.vocab,
    num_layers=args.layers,
    embed_dim=args.width,
    hidden_dim=args.ffn,
    num_heads=args.heads,
    num_kv_heads=args.kv_heads,
    head_dim=args.head_dim,
    sliding_window=args.window,
    query_scale=args.head_dim**-0.5,
    local_rope_base=10_000.0,
    global_rope_base=1_000_000.0,
    global_rope_factor=1.0,
    vision=None,
  )
  config = base.get_config()
  config.data.prompts_per_step = args.prompts
  config.data.prompt_buckets = (args.prompt_length,)
  config.model.name = "tiny"
  config.model.weights = f"random:{args.seed}"
  config.model.compute_dtype = "float32"
  config.model.remat = args.remat
  config.model.logits_chunk = args.logits_chunk
  config.rollout.num_generations = args.num_generations
  config.rollout.max_new_tokens = args.completion_length
  config.rewards.preset = "answer"
  config.rewards.custom = ("step_workload:rewards",)
  config.rewards.custom_weights = (1.0,)
  config.rewards.num_workers = 0  # So that rewards count in our CPU-seconds.
  config.objective.preset = "grpo"
  config.objective.beta = args.beta
  config.objective.kl_estimator = "k3"
  config.optimizer.learning_rate = args.learning_rate
  config.optimizer.b2 = 0.999
  config.optimizer.max_grad_norm = float("inf")
  config.train.microbatch_bundles = args.our_micro_prompts
  return run_config.Config.from_config_dict(config)


def batch(args, rows: list[list[int]]) -> pipeline.Batch:
  """The prompts as a batch of the data pipeline."""
  ids = np.full((len(rows), args.prompt_length), workload.PAD, np.int32)
  for out, row in zip(ids, rows, strict=True):
    out[: len(row)] = row
  nothing = {
    field.name: "" for field in dataclasses.fields(records.Problem)
  } | {"choices": (), "metadata": {}, "precision": -1, "images": ()}
  asked = nothing | {"question_type": "free_form", "answer_type": "text"}
  return pipeline.Batch(
    prompt_ids=ids,
    prompt_length=np.array([len(row) for row in rows], np.int32),
    images=np.zeros((len(rows), 0, 1, 1, 3), np.uint8),
    prompt_index=np.arange(len(rows), dtype=np.int32),
    valid=np.ones(len(rows), bool),
    problems=tuple(
      records.Problem(**asked | {"pid": str(i), "answer": "none"})
      for i in range(len(rows))
    ),
    completion_ids=None,
    completion_mask=None,
    labels=None,
  )


def main() -> None:
  """Runs one step for each line on stdin."""
  args = workload.parse(workload.parser(__doc__))
  runner = workload.Runner()
  config = settings(args)
  mesh = sharding.make_mesh(1, 1, 1)
  with jax.set_mesh(mesh):
    sampler = Sampler(config.model, config.rollout, mesh, Words())
    collector = Collector(sampler, config.collector_config)
    learner = Learner(
      config.model, sampler.forward, mesh, config.learner_config
    )
    params = load.load_params(config.model, mesh)
    reference = Frozen(
      params,
      mesh,
      dtype=config.model.reference_type,
      memory=config.model.reference_memory,
      setting="model.reference_memory",
    )
    state = learner.init(load.load_params(config.model, mesh))
    del params
    collect = runner.time_phase("rollout", collector.collect, _is_ready)
    score_reference = runner.time_phase(
      "reference", score.score_batch, jax.block_until_ready
    )
    update = runner.time_phase("update", learner.update, jax.block_until_ready)
    key = jax.random.key(config.seed)
    prompts = workload.repeat(
      [batch(args, rows) for rows in workload.prompts(args)]
    )
    while True:
      runner.wait()
      experience = collect(
        state.params, prompts, key, position=runner.steps, num_shown=None
      )
      ref_logps, _ = score_reference(
        sampler.forward,
        reference.params,
        experience.batch,
        num_microbatches=config.num_microbatches,
      )
      train_batch = experience.batch.replace(ref_per_token_logps=ref_logps)
      state, metrics = update(state, train_batch, None)
      runner.done(tokens=int(metrics["tokens"]), loss=float(metrics["loss"]))


def _is_ready(experience: Experience) -> None:
  jax.block_until_ready((experience.batch, experience.metrics))


if __name__ == "__main__":
  main()
