"""Compares one GRPO update of ours with Tunix's, compiled for the same slice.

Nothing runs: the memory of each update comes from the compiler, and the work
from the jaxpr. Prints both sides and their ratios; the last line is JSON.

  python benchmarks/aot_vs_tunix.py --tunix_python=PYTHON

PYTHON is the Python of a venv with Tunix and with our jax and libtpu, so that
the compiler is the same: the last line that
`bash benchmarks/setup_peers.sh --aot` prints. Without TPUs Tunix does not shard
its activations, so the script restores that. The script sets the temperature,
as Tunix's learner does at run time, and donates only the optimizer, as Tunix's
trainer does. Both sides use AdamW with parameters and moments in bfloat16, as
Tunix does, and recompute layers.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grpo_tpu.models.network import ForwardConfig  # noqa: E402
from grpo_tpu.planning import aot  # noqa: E402
from grpo_tpu.rl.train_batch import TrainBatch  # noqa: E402

_VOCABULARY = 262_144
_LEARNING_RATE = 1e-6
_LORA_ALPHA = 32.0
# The same weights on both sides; Tunix names them by modules.
_LORA_TARGETS = ("q", "kv", "output", "gating", "linear")
_TUNIX_TARGETS = (
  ".*q_einsum|.*kv_einsum|.*attn_vec_einsum|.*gate_proj|.*up_proj|.*down_proj"
)


def main() -> None:
  """Compiles both sides, each in its own process and Python, and compares."""
  arguments = _arguments()
  if arguments.side:
    _SIDES[arguments.side](arguments)
    return
  ratios = {}
  for kind, rank in (("full", 0), ("lora", arguments.lora_rank)):
    if kind not in arguments.kinds.split(","):
      continue
    sides = {}
    for side, python in (
      ("ours", sys.executable),
      ("tunix", arguments.tunix_python),
    ):
      result = _measure(side, python, rank, arguments)
      sides[side] = result
      hbm = result["hbm_bytes"] / 2**30 if result["hbm_bytes"] else float("nan")
      print(
        f"{kind} {side}: {hbm:.2f} GiB of HBM per device, "
        f"{result['flops'] / 1e12:.1f} TFLOP on all",
        flush=True,
      )
    ratios[kind] = {
      f"{name}_ratio": sides["ours"][key] / sides["tunix"][key]
      for name, key in (("hbm", "hbm_bytes"), ("flops", "flops"))
      if sides["tunix"][key]
    }
  first = next(iter(ratios.values()))
  print(json.dumps(first | ratios))


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--tunix_python", default=sys.executable)
  parser.add_argument("--topology", default="v5e:4x4")
  parser.add_argument("--layers", type=int, default=34)
  parser.add_argument("--prompts", type=int, default=8)
  parser.add_argument("--completions", type=int, default=8)
  parser.add_argument("--prompt_tokens", type=int, default=512)
  parser.add_argument("--new_tokens", type=int, default=1536)
  parser.add_argument(
    "--tensor", type=int, default=2, help="tensor shards of our mesh"
  )
  parser.add_argument(
    "--tunix_tensor", type=int, default=1, help="tensor shards of Tunix's mesh"
  )
  parser.add_argument("--tunix_remat", default="DECODER")
  parser.add_argument("--kinds", default="full,lora")
  parser.add_argument("--lora_rank", type=int, default=16)
  parser.add_argument("--flops_only", action="store_true")
  parser.add_argument("--side", help=argparse.SUPPRESS)
  parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
  parser.add_argument("--folder", help=argparse.SUPPRESS)
  return parser.parse_args()


def _measure(side, python, rank, arguments) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    command = [python, __file__, f"--side={side}", f"--folder={folder}"]
    values = vars(arguments) | {"rank": rank}
    for name in ("layers", "prompts", "completions", "prompt_tokens", "rank"):
      command.append(f"--{name}={values[name]}")
    for name in ("new_tokens", "tensor", "tunix_tensor", "tunix_remat"):
      command.append(f"--{name}={values[name]}")
    command.append(f"--topology={arguments.topology}")
    command += ["--flops_only"] * arguments.flops_only
    environment = os.environ | aot.ENVIRONMENT | {"TMPDIR": folder}
    subprocess.run(command, env=environment, check=True)
    return json.loads((pathlib.Path(folder) / "answer.json").read_text())


def _answer(arguments, traced) -> None:
  """Writes the result of a side, and ends the process and its compiler."""
  from grpo_tpu.planning import flops

  folder = pathlib.Path(arguments.folder)
  result = {"flops": flops.count_jaxpr(traced.jaxpr), "hbm_bytes": None}
  if not arguments.flops_only:
    hbm_bytes, _ = aot.compile_buffers(traced.lower(), folder / "dump")
    result["hbm_bytes"] = hbm_bytes
  (folder / "answer.json").write_text(json.dumps(result))
  os._exit(0)


def _devices(topology: str):
  from jax.experimental import topologies

  return topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  ).devices


def _adamw():
  """AdamW whose gradients and moments have the dtype of the parameters."""
  import jax
  import optax

  def cast(updates, state, params):
    return jax.tree.map(lambda u, p: u.astype(p.dtype), updates, params), state

  return optax.chain(
    optax.GradientTransformation(lambda _: optax.EmptyState(), cast),
    optax.adamw(_LEARNING_RATE),
  )


def _ours(arguments) -> None:
  import dataclasses

  import jax
  import jax.numpy as jnp

  from grpo_tpu.distributed import sharding
  from grpo_tpu.models.gemma3 import attention, lora, weights
  from grpo_tpu.models.gemma3 import config as gemma3_config
  from grpo_tpu.models.settings import LoraConfig
  from grpo_tpu.rl import train_state, train_step
  from grpo_tpu.rl.settings import PRESETS

  config = dataclasses.replace(
    gemma3_config.CONFIGS["gemma3_4b"],
    num_layers=arguments.layers,
    vision=None,
  )
  devices = _devices(arguments.topology)
  tensor = arguments.tensor
  mesh = sharding.make_mesh(1, len(devices) // tensor, tensor, devices=devices)
  settings = None
  if arguments.rank:
    settings = LoraConfig(
      rank=arguments.rank, alpha=_LORA_ALPHA, targets=_LORA_TARGETS, init=""
    )

  def with_shardings(tree):
    return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree,
      sharding.param_shardings(mesh, tree),
    )

  bf16 = jnp.dtype(jnp.bfloat16)
  params = weights.abstract_params(config, bf16)
  tx = _adamw()
  trained = lora.abstract_adapters(config, settings) if settings else params
  trained = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, bf16), trained)
  step = jax.ShapeDtypeStruct((), jnp.int32)
  opt_state = jax.eval_shape(tx.init, trained)
  state = with_shardings(train_state.TrainState(step, step, trained, opt_state))
  model = ForwardConfig(
    config=config,
    dtype=bf16,
    remat="full",
    temperature=1.0,
    chunk_size=1024,
    train_vision=False,
    attention=attention.choose_implementation("auto", "tpu"),
  )
  update = train_step.make_train_step(
    model,
    tx,
    config=PRESETS["grpo"],
    num_microbatches=1,
    lora=settings,
  )
  u, c, t = arguments.prompts, arguments.completions, arguments.new_tokens

  def array(dtype, *shape):
    return sharding.abstract_batch(mesh, dtype, u, *shape)

  bundles = TrainBatch(
    prompt_ids=array(jnp.int32, arguments.prompt_tokens),
    prompt_length=array(jnp.int32),
    images=array(jnp.uint8, 0, 1, 1, 3),
    completion_ids=array(jnp.int32, c, t),
    completion_mask=array(jnp.bool_, c, t),
    advantages=array(jnp.float32, c),
    ref_per_token_logps=array(jnp.float32, c, t),
  )
  frozen = (with_shardings(params),) if settings else ()
  with jax.set_mesh(mesh):
    _answer(arguments, update.trace(state, bundles, *frozen))


def _tunix(arguments) -> None:
  import jax
  import jax.numpy as jnp
  import numpy as np
  import qwix
  from flax import nnx
  from jax.interpreters import pxla
  from jax.sharding import Mesh, NamedSharding
  from jax.sharding import PartitionSpec as P
  from tunix.models.gemma3 import model as gemma3
  from tunix.rl import algo_core
  from tunix.rl.grpo import grpo_learner
  from tunix.sft import peft_trainer
  from tunix.utils import sharding_utils

  def shard(x, spec, eager=False):
    """Shards as Tunix does on TPUs."""
    del eager
    mesh = pxla.thread_resources.env.physical_mesh
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

  sharding_utils.shard = shard
  devices = np.array(_devices(arguments.topology))
  tensor = arguments.tunix_tensor
  mesh = Mesh(devices.reshape(-1, tensor), ("fsdp", "tp"))
  import dataclasses

  config = dataclasses.replace(
    gemma3.ModelConfig.gemma3_4b_it(),
    num_layers=arguments.layers,
    remat_config=gemma3.RematConfig[arguments.tunix_remat],
  )
  wanted = nnx.LoRAParam if arguments.rank else nnx.Param

  def make():
    model = gemma3.Gemma3(config, rngs=nnx.Rngs(0))
    if arguments.rank:
      provider = qwix.LoraProvider(
        module_path=_TUNIX_TARGETS, rank=arguments.rank, alpha=_LORA_ALPHA
      )
      model = qwix.apply_lora_to_model(
        model, provider, **model.get_model_input()
      )
    return model, nnx.Optimizer(model, _adamw(), wrt=wanted)

  def with_shardings(state):
    specs = nnx.get_partition_spec(state)
    return jax.tree.map(
      lambda x, spec: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, spec or P())
      ),
      state,
      specs,
    )

  with mesh:
    model, optimizer = nnx.eval_shape(make)
    graphs, states = zip(nnx.split(model), nnx.split(optimizer), strict=True)
    states = [with_shardings(state) for state in states]
    algorithm = grpo_learner.GRPOConfig(num_generations=arguments.completions)
    object.__setattr__(algorithm, "temperature", 1.0)
    stub = types.SimpleNamespace(
      gen_model_input_fn=lambda example: {
        "train_example": example,
        "algo_config": algorithm,
        "pad_id": 0,
        "eos_id": 1,
      },
      loss_fn=algo_core.grpo_loss_fn,
      _lora_enabled=bool(arguments.rank),
      _has_aux=True,
    )

    def step(model_state, optimizer_state, example):
      model = nnx.merge(graphs[0], model_state)
      optimizer = nnx.merge(graphs[1], optimizer_state)
      out = peft_trainer.PeftTrainer._train_step(
        stub, model, optimizer, example
      )
      return nnx.state(model), nnx.state(optimizer), out

    rows = arguments.prompts * arguments.completions
    batch = NamedSharding(mesh, P("fsdp"))

    def array(dtype, *shape):
      return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=batch)

    p, t = arguments.prompt_tokens, arguments.new_tokens
    example = grpo_learner.TrainExample(
      prompt_ids=array(jnp.int32, p),
      prompt_mask=array(jnp.bool_, p),
      completion_ids=array(jnp.int32, t),
      completion_mask=array(jnp.bool_, t),
      advantages=array(jnp.float32),
      ref_per_token_logps=array(jnp.float32, t),
      old_per_token_logps=None,
    )
    jitted = jax.jit(step, donate_argnums=1)
    _answer(arguments, jitted.trace(*states, example))


_SIDES = {"ours": _ours, "tunix": _tunix}

if __name__ == "__main__":
  main()
