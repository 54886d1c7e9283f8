"""Settings and a stand-in for the compiler, for the tests of planning."""

import importlib.util
import json
import pathlib
import shlex
import subprocess
import sys

from grpo_tpu.config import schema as run_config
from grpo_tpu.planning import planner, programs, roofline

ROOT = pathlib.Path(__file__).resolve().parents[3]


GIB = 2**30


REMAT = {"none": 8, "dots": 4, "full": 2, "offload": 1}


PARTS = ("pictures", "rollout", "evaluation", "update")


def config_of(name, *kind, **changes):
  path = ROOT / "configs" / f"{name}.py"
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  values = module.get_config(*kind)
  values.update_from_flattened_dict(changes)
  return run_config.Config.from_config_dict(values)


def config_of_4b(**changes):
  """The 4B overlay on a mesh of 8 x 2."""
  mesh = {"mesh.fsdp": 8, "mesh.tensor": 2}
  return config_of("gemma3_4b_v5e_16", **(mesh | changes))


class ScriptedCompiler(planner.Compiler):
  """Computes the bytes that programs take of a device by a formula."""

  def __init__(self, sampling, update, **others):
    super().__init__()
    self.needs = dict.fromkeys(PARTS, sampling)
    self.needs |= {"update": update} | others
    self.asked = set()

  def plan(self, config, topology, names=None):
    rows = []
    for name in names or programs.names(config):
      need = self.needs[programs.part_of(name)](config)
      sent = roofline.sent_bytes(config, topology, name)
      least = roofline.least_hbm_bytes(config, name)
      seconds = roofline.bounds_seconds(topology.chip, 0.0, least, sent)
      row = {"name": name, "resident_bytes": need, "completion_tokens": 1}
      rows.append(row | {"bounds_seconds": seconds})
      self.asked.add((name, str(topology), config))
    return planner.Plan(config, topology, rows, {})


def small_need(_):
  return GIB


def by_rows(config):
  """Bytes of a sampler whose caches take 1 GiB for eight prompts."""
  settings, shards = config.rollout, config.mesh.replica * config.mesh.fsdp
  prompts = settings.prompts_at_a_time or config.data.prompts_per_step
  return prompts * 8 * GIB // shards // config.mesh.tensor


def by_remat(config):
  shards = config.mesh.replica * config.mesh.fsdp
  micro = config.train.microbatch_bundles / shards
  length = config.data.prompt_buckets[-1] / 1024
  return int(micro * length * 2 * GIB * REMAT[config.model.remat])


def parse_command_line(name, flags):
  """The settings that the program reads from a command line."""
  code = (
    "import json, sys\n"
    "from grpo_tpu.config import flags, schema\n"
    "flags.parse(sys.argv)\n"
    "values = flags.CONFIG.value\n"
    "print(json.dumps(schema.Config.from_config_dict(values).to_dict()))"
  )
  done = subprocess.run(
    f"{sys.executable} -c {shlex.quote(code)} --workdir=/none "
    f"--config=configs/{name}.py {flags}",
    shell=True,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return run_config.Config.from_config_dict(json.loads(done.stdout))
