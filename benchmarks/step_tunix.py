"""Tunix's GRPO learner, for `grpo_step.py`; runs in `.venv-tunix`.

These are its best settings: the shortest possible cache, one rollout of all
rows, sampling that does not sort the vocabulary (no top-k, and top-p 1 is
skipped), no log-probabilities of the old policy, which one iteration does not
need, and the same microbatches as ours.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import step_workload as workload
from flax import nnx
from tunix.models.gemma3 import model as gemma
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout


class Words:
  """A tokenizer for Tunix whose words are ids."""

  encode = staticmethod(workload.ids)
  decode = staticmethod(workload.text)

  def bos_id(self) -> int:
    """The id that Tunix puts before each prompt."""
    return workload.BOS

  def eos_id(self) -> int:
    """An id that the rollout ignores, as it has its own stop ids."""
    return workload.EOS

  def pad_id(self) -> int:
    """The id of padding."""
    return workload.PAD


def model(args, mesh) -> nnx.Module:
  """A model with random weights; Tunix itself starts MLPs at zero."""
  network = gemma.Gemma3(
    gemma.ModelConfig(
      num_layers=args.layers,
      num_embed=args.vocab,
      embed_dim=args.width,
      hidden_dim=args.ffn,
      num_heads=args.heads,
      head_dim=args.head_dim,
      num_kv_heads=args.kv_heads,
      sliding_window_size=args.window,
      local_base_frequency=10_000,
      global_base_frequency=1_000_000,
      param_dtype=jnp.dtype("float32"),
    ),
    rngs=nnx.Rngs(params=args.seed),
  )
  graph, state = nnx.split(network)
  shardings = jax.tree.map(
    lambda spec: jax.sharding.NamedSharding(mesh, spec),
    nnx.get_partition_spec(state),
  )
  leaves, tree = jax.tree.flatten(state)
  keys = jax.random.split(jax.random.key(args.seed), len(leaves))
  drawn = [
    0.02 * jax.random.normal(key, x.shape, x.dtype) if x.ndim > 1 else x
    for key, x in zip(keys, leaves, strict=True)
  ]
  state = jax.device_put(jax.tree.unflatten(tree, drawn), shardings)
  return nnx.merge(graph, state)


def rewards(prompts, completions, **_) -> list[float]:
  """`workload.reward` with Tunix's signature."""
  return workload.rewards(completions, prompts)


def main() -> None:
  """Runs one step for each line on stdin."""
  args = workload.parse(workload.parser(__doc__))
  runner = workload.Runner()
  mesh = jax.make_mesh(
    (1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  with mesh:
    actor, reference = model(args, mesh), model(args, mesh)
  batches = [
    {"prompts": np.array([workload.text(row[1:]) for row in rows])}
    for rows in workload.prompts(args)
  ]
  cluster = rl_cluster.RLCluster(
    actor=actor,
    reference=reference,
    tokenizer=Words(),
    cluster_config=rl_cluster.ClusterConfig(
      role_to_mesh={
        role: mesh
        for role in (
          rl_cluster.Role.ACTOR,
          rl_cluster.Role.REFERENCE,
          rl_cluster.Role.ROLLOUT,
        )
      },
      rollout_engine="vanilla",
      offload_to_cpu=False,
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(
          args.learning_rate, b1=0.9, b2=0.999, weight_decay=0.0
        ),
        eval_every_n_steps=10**9,
        max_steps=10**9,
        mini_batch_size=args.prompts,
        train_micro_batch_size=args.micro_prompts,
        rollout_micro_batch_size=args.prompts,
        compute_logps_micro_batch_size=args.micro_prompts,
        pbar_description=None,
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=args.completion_length,
        max_prompt_length=args.prompt_length,
        kv_cache_size=args.prompt_length + args.completion_length + 1,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        eos_tokens=[args.vocab + 7],  # All rows have full length.
        seed=jax.random.PRNGKey(args.seed),
      ),
    ),
  )
  learner = grpo_learner.GRPOLearner(
    rl_cluster=cluster,
    reward_fns=rewards,
    algo_config=grpo_learner.GRPOConfig(
      num_generations=args.num_generations,
      num_iterations=1,
      beta=args.beta,
      epsilon=0.2,
      kl_loss_mode="low_var_kl",  # k3.
    ),
  )
  generate = cluster.rollout.generate
  tokens = 0

  def generate_with_new_seed(prompts, config, **kwargs):
    nonlocal tokens
    # Without this, every step would draw the same noise.
    config.seed = jax.random.PRNGKey(args.seed + 1000 + runner.steps)
    output = generate(prompts, config, **kwargs)
    tokens = int(sum(len(row) for row in output.tokens))
    return output

  cluster.rollout.generate = runner.time_phase(
    "rollout", generate_with_new_seed
  )
  cluster.get_ref_per_token_logps = runner.time_phase(
    "reference", cluster.get_ref_per_token_logps, jax.block_until_ready
  )

  def wait_for_update(_=None):
    jax.block_until_ready(
      jax.tree.leaves(nnx.state(cluster.actor_trainer.model))
    )

  cluster.update_actor = runner.time_phase(
    "update", cluster.update_actor, wait_for_update
  )
  step = learner._run_global_step

  def one_step(*step_args, **kwargs):
    runner.wait()
    step(*step_args, **kwargs)
    wait_for_update()
    runner.done(tokens=tokens)

  learner._run_global_step = one_step
  learner.train(workload.repeat(batches))


if __name__ == "__main__":
  main()
