"""Plans for described slices; no test needs a TPU."""

import functools
import importlib.util
import json
import os
import pathlib
import shlex
import subprocess
import sys
import unittest.mock

import jax
import pytest

from data_pipelines import validation
from grpo_tpu.config import schema as run_config
from grpo_tpu.distributed import hardware, sharding
from grpo_tpu.models.settings import REMAT_POLICIES
from grpo_tpu.planning import advise, aot, plan, planner, programs, roofline
from grpo_tpu.planning import changes as changing

ROOT = pathlib.Path(__file__).resolve().parents[3]
TOPOLOGIES = {
  "gemma3_4b_v5e_16": "v5e:4x4",
  "gemma3_4b_v6e_16": "v6e:4x4",
  "gemma3_4b_v5p_16": "v5p:2x2x2",
  "gemma3_12b_v5p_64": "v5p:2x4x4",
  "gemma3_27b_v5p_256": "v5p:4x4x8",
  "gemma3_27b_v6e_256": "v6e:16x16",
}
MARGIN = 0.1


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


@pytest.fixture
def libtpu():
  if importlib.util.find_spec("libtpu") is None:
    pytest.skip("no libtpu for this machine")


def test_a_mesh_that_does_not_cover_the_slice_names_the_nearest():
  config = config_of("smoke")
  with pytest.raises(ValueError, match=r"4 devices of v5e:2x2.*mesh.fsdp=4"):
    changing.check_mesh(config, hardware.parse_topology("v5e:2x2"))


def test_slices_without_replicas_of_their_own_name_the_nearest():
  config = config_of_4b()
  with pytest.raises(ValueError, match=r"2 slices.*mesh.replica=2"):
    changing.check_mesh(config, hardware.parse_topology("v5e:2x4*2"))


def test_step_bounds_count_every_call_of_a_program():
  config = config_of_4b(**{"rollout.prompts_at_a_time": 16})
  rows = [
    {
      "name": name,
      "bounds_seconds": {"hbm": 1.0, "ici": 0.5},
      "completion_tokens": 10,
    }
    for name in programs.names(config)
  ]
  made = planner.Plan(config, hardware.parse_topology("v5e:4x4"), rows, {})
  bounds = made.step_bounds()
  # Four rollouts, each with a prefill, 1,023 tokens in chunks of 128, and
  # results; then an update. No row moves, and nothing is evaluated.
  seconds = 4 * (1 + 1023 / 128 + 1) + 1
  text = bounds["text"]["step_seconds_at_least"]
  assert text == pytest.approx(seconds)
  assert bounds["text"]["completion_tokens_per_second_at_most"] == 10 / text
  # One call encodes 64 images, eight on each of eight shards.
  image = bounds["image"]["step_seconds_at_least"]
  assert image == pytest.approx(seconds + 1)


def test_a_missing_compiler_is_an_error_with_a_remedy(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"libtpu.*pip install.*macOS"):
    planner.check_compiler()


def test_a_plan_asks_for_the_compiler_before_it_compiles(monkeypatch, tmp_path):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  config = config_of_4b()
  with pytest.raises(validation.SettingError, match="needs libtpu"):
    plan.run(config, str(tmp_path), "v5e:4x4", advise=False)


@pytest.mark.parametrize("gibibytes, verdict", [(10, "fits"), (20, "DOES NOT")])
def test_the_table_says_how_much_room_there_is(gibibytes, verdict):
  config = config_of_4b()
  row = {
    "name": "train_step (text)",
    "bytes_by_class": {"params": 2**30, "temporaries": 2**31},
    "beside_bytes": 2**30,
    "resident_bytes": gibibytes * 2**30,
    "flops": 2e12,
    "least_hbm_traffic_bytes": 3e9,
    "collective_bytes": {"ici": 4e9, "dcn": 0.0},
    "bounds_seconds": {"compute": 1.0, "hbm": 0.5, "ici": 0.25, "dcn": 0.0},
    "completion_tokens": 7,
    "defects": ["something odd"],
  }
  made = planner.Plan(config, hardware.parse_topology("v5e:4x4"), [row], {})
  lines = plan.table(made).splitlines()
  memory, work = (x.split()[2:] for x in lines if x.startswith("train_step"))
  room = f"{15.75 - gibibytes:.2f}"
  assert memory == [
    *("1.00", "0.00", "0.00", "0.00", "0.00", "2.00", "1.00"),
    *(f"{gibibytes}.00", room),
  ]
  assert work[:3] == ["2.0", "3.0", "4.00"] and work[-1] == "compute"
  assert "look at train_step (text): something odd" in lines
  assert lines[-1].startswith(verdict)


def test_the_nearest_mesh_keeps_what_it_can():
  config = config_of("smoke", **{"mesh.fsdp": 4, "mesh.tensor": 2})
  near = changing.nearest_mesh(config, hardware.parse_topology("v5e:4x4"))
  assert changing.drop_unchanged(config, near) == {"mesh.fsdp": 8}
  # 64 prompts do not divide over 24 shards; 72 do, and 24 at a time.
  near = changing.nearest_mesh(config, hardware.parse_topology("v5e:4x4*3"))
  assert changing.drop_unchanged(config, near) == {
    "mesh.replica": 3,
    "mesh.fsdp": 8,
    "data.prompts_per_step": 72,
    "train.microbatch_bundles": 24,
    "eval.batch_size": 264,
  }


def test_a_plan_wants_a_topology(tmp_path):
  with pytest.raises(validation.SettingError, match="--topology.*v5e:4x4"):
    plan.run(config_of_4b(), str(tmp_path), None, advise=False)


PARTS = ("pictures", "rollout", "evaluation", "update")


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


GIB = 2**30
REMAT = {"none": 8, "dots": 4, "full": 2, "offload": 1}


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


def advised(config, topology, sampling=by_rows, update=by_remat):
  compiler = ScriptedCompiler(sampling, update)
  return advise.advise(config, hardware.parse_topology(topology), compiler)


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


def test_advice_is_the_largest_step_that_leaves_a_margin():
  config = config_of_4b(**{"rollout.num_generations": 4})
  found = advised(config, "v5e:4x4")
  made = found.plan
  assert made.fits(advise.MARGIN)
  limit = (1 - advise.MARGIN) * made.topology.chip.hbm_limit_bytes
  # The cheapest remat with which one bundle per shard fits.
  policy = made.config.model.remat
  cheaper = REMAT_POLICIES[: REMAT_POLICIES.index(policy)]
  shards = made.config.mesh.fsdp
  for name in cheaper:
    dearer = {"model.remat": name, "train.microbatch_bundles": shards}
    assert by_remat(changing.apply_changes(made.config, dearer)) > limit
  for setting, need, now in (
    (
      "train.microbatch_bundles",
      by_remat,
      made.config.train.microbatch_bundles,
    ),
    (
      "rollout.prompts_at_a_time",
      by_rows,
      made.config.rollout.prompts_at_a_time or 64,
    ),
  ):
    assert need(made.config) <= limit
    assert (
      now == 64
      or need(changing.apply_changes(made.config, {setting: 2 * now})) > limit
    )


@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:4x4*2"])
def test_advice_can_be_pasted(topology):
  name = "gemma3_4b_v5e_16"
  found = advised(config_of(name), topology)
  assert found.changes
  assert str(found).endswith(changing.format_flags(found.changes))
  assert (
    parse_command_line(name, changing.format_flags(found.changes))
    == found.plan.config
  )


def test_a_tuple_and_a_word_survive_the_shell():
  changes = {"data.prompt_buckets": (384,), "model.remat": "offload"}
  wanted = changing.apply_changes(config_of("smoke"), changes)
  assert parse_command_line("smoke", changing.format_flags(changes)) == wanted


def test_advice_gives_up_the_longest_prompts_last():
  def large_need(config):
    return 20 * GIB if config.data.prompt_buckets[-1] > 512 else GIB

  found = advised(config_of_4b(), "v5e:4x4", update=large_need)
  assert found.changes["data.prompt_buckets"] == (384, 512)
  kept = advised(config_of_4b(), "v5e:4x4")
  assert "data.prompt_buckets" not in kept.changes


def test_advice_that_changes_nothing_says_so():
  config = config_of_4b()
  found = advised(config, "v5e:4x4", lambda _: GIB, lambda _: GIB)
  again = advised(found.plan.config, "v5e:4x4", lambda _: GIB, lambda _: GIB)
  assert again.changes == {} and "settings have this step already" in str(again)


def test_advice_is_the_mesh_whose_step_has_the_least_bound():
  """It need not be the first mesh, and not all meshes are compiled."""
  config, described = config_of_4b(), hardware.parse_topology("v5e:4x4")

  def by_tensor(config):
    prompts = config.rollout.prompts_at_a_time or 64
    return prompts * config.mesh.tensor**2 * GIB // 16

  compiler = ScriptedCompiler(small_need, small_need, rollout=by_tensor)
  search = advise._Search(config, described, compiler, advise.MARGIN)
  meshes = advise.meshes(config, described)
  assert meshes == sorted(meshes, key=lambda x: x[0])
  bounds = {}
  for least, mesh in meshes:
    _, made = search.largest_step(mesh, 64, 64, REMAT_POLICIES)
    bounds[made.config.mesh.tensor] = advise.step_seconds(made)
    assert least <= bounds[made.config.mesh.tensor]
  compiler.asked.clear()
  found = advise.advise(config, described, compiler)
  best = found.plan.config.mesh.tensor
  assert best == min(bounds, key=bounds.get) != meshes[0][1]["mesh.tensor"]
  asked = {config.mesh.tensor for _, _, config in compiler.asked}
  assert asked < set(bounds)


def test_advice_is_of_the_whole_run():
  """The search compiles images only, but the result fits with text too."""
  settings, topology = config_of_4b(), hardware.parse_topology("v5e:4x4")

  class Odd(ScriptedCompiler):
    def plan(self, config, topology, names=None):
      made = super().plan(config, topology, names)
      for row in made.programs:
        if row["name"] == "train_step (text)":
          row["resident_bytes"] = 15 * GIB
      return made

  with pytest.raises(validation.SettingError):
    advise.advise(settings, topology, Odd(small_need, small_need))


def test_where_nothing_fits_advice_says_what_would_help():
  with pytest.raises(validation.SettingError, match=r"lora.*larger slice"):
    advised(config_of_4b(), "v5e:4x4", lambda _: 99 * GIB)


def refusal(config, topology, monkeypatch, tmp_path, **needs):
  compiler = ScriptedCompiler(**needs)
  monkeypatch.setattr(planner, "Compiler", lambda: compiler)
  monkeypatch.setattr(planner, "check_compiler", lambda: None)
  monkeypatch.setattr(plan, "table", lambda made: "")
  monkeypatch.setattr(planner.Plan, "to_dict", lambda made: {})
  with pytest.raises(validation.SettingError) as caught:
    plan.run(config, str(tmp_path), topology, advise=False)
  return str(caught.value), compiler


def by_batch(config):
  return config.eval.batch_size * GIB // 3


def by_images(config):
  return config.rollout.pictures_per_shard * 3 * GIB


@pytest.mark.parametrize(
  "needs, remedy, one_less",
  [
    # 16 of 64 bundles take 8 GiB, and 32 of them 16.
    (
      {"update": by_remat},
      {"train.microbatch_bundles": 16},
      {"train.microbatch_bundles": 32},
    ),
    # Without remat not even one bundle per shard fits.
    (
      {"update": lambda config: 4 * by_remat(config)},
      {"model.remat": "offload", "train.microbatch_bundles": 8},
      {"train.microbatch_bundles": 8},
    ),
    (
      {"rollout": by_rows},
      {"rollout.prompts_at_a_time": 16},
      {"rollout.prompts_at_a_time": 32},
    ),
    (
      {"evaluation": by_batch},
      {"eval.batch_size": 40},
      {"eval.batch_size": 48},
    ),
    (
      {"pictures": by_images},
      {"rollout.pictures_per_shard": 5},
      {"rollout.pictures_per_shard": 6},
    ),
  ],
  ids=["bundles", "remat", "prompts", "evaluation", "pictures"],
)
def test_a_refusal_names_the_nearest_settings_that_fit(
  monkeypatch, tmp_path, needs, remedy, one_less
):
  """Only the settings at fault change, as little as possible."""
  changes = {"train.microbatch_bundles": 64, "rollout.prompts_at_a_time": 32}
  config = config_of_4b(**changes)
  needs = {"sampling": small_need, "update": small_need} | needs
  error, compiler = refusal(config, "v5e:4x4", monkeypatch, tmp_path, **needs)
  changes = changing.drop_unchanged(config, remedy)
  assert error.endswith(
    f"with --topology=v5e:4x4 {changing.format_flags(changes)}"
  )
  described = hardware.parse_topology("v5e:4x4")
  for changes, fits in ((remedy, True), (one_less, False)):
    new = changing.apply_changes(config, changes)
    assert compiler.plan(new, described).fits() == fits


def test_where_the_slice_is_too_small_the_next_one_is_named(
  monkeypatch, tmp_path
):
  config = config_of_4b()

  def large_need(config):
    return 8 * 16 * GIB // config.mesh.fsdp

  error, compiler = refusal(
    config,
    "v5e:4x4",
    monkeypatch,
    tmp_path,
    sampling=small_need,
    update=large_need,
  )
  assert error.endswith(
    "with --topology=v5e:4x8 --config.mesh.fsdp=16 "
    "--config.train.microbatch_bundles=16"
  )
  assert "v5e:8x8" not in {topology for _, topology, _ in compiler.asked}


@pytest.mark.parametrize("bundles", [8, 64])
def test_a_reference_moves_to_the_hosts_memory_before_the_slice_grows(
  monkeypatch, tmp_path, bundles
):
  """It stays if fewer bundles at a time are enough."""
  changes = {"objective.beta": 0.1, "train.microbatch_bundles": bundles}
  config = config_of_4b(**changes)

  def large_need(config):
    return (8 if config.model.reference_memory == "pinned_host" else 16) * GIB

  error, _ = refusal(
    config,
    "v5e:4x4",
    monkeypatch,
    tmp_path,
    sampling=small_need,
    update=large_need if bundles == 8 else by_remat,
  )
  remedy = (
    {"model.reference_memory": "pinned_host"}
    if bundles == 8
    else {"train.microbatch_bundles": 16}
  )
  assert error.endswith(
    f"with --topology=v5e:4x4 {changing.format_flags(remedy)}"
  )


def test_a_run_that_no_program_could_make_fit_is_refused_before_any_compiles(
  monkeypatch, tmp_path
):
  """Parameters and moments of 27B take 81 GiB of each of four chips."""
  config = config_of(
    "gemma3_27b_v5p_256",
    **{
      "mesh.fsdp": 4,
      "mesh.tensor": 1,
      "data.prompts_per_step": 64,
      "train.microbatch_bundles": 64,
    },
  )
  error, compiler = refusal(
    config,
    "v5e:2x2",
    monkeypatch,
    tmp_path,
    sampling=small_need,
    update=small_need,
  )
  assert "must have room for parameters, optimizer and reference" in error
  # The first slice with room for these arrays.
  assert "it fits with --topology=v5e:4x8 --config.mesh.fsdp=32" in error
  assert {topology for _, topology, _ in compiler.asked} == {"v5e:4x8"}


def test_a_run_that_fits_nowhere_is_refused_without_a_slice(
  monkeypatch, tmp_path
):
  config = config_of_4b()

  def large_need(_):
    return 99 * GIB

  error, _ = refusal(
    config,
    "v5e:4x4",
    monkeypatch,
    tmp_path,
    sampling=large_need,
    update=large_need,
  )
  assert "No slice of v5e has room" in error and "lora.rank=16" in error


def test_a_program_is_compiled_again_only_if_relevant_settings_change(
  monkeypatch,
):
  asked = []

  def compile_program(config, topology, name):
    asked.append(name)
    return {
      "name": name,
      "bytes_by_class": {"params": 3, "batch": 2},
      "kept_bytes": 5,
      "hbm_bytes": 10,
      "flops": 1.0,
      "rest_bytes": 1,
      "completion_tokens": 1,
      "collectives": [],
      "cpu_seconds": 1.0,
    }

  monkeypatch.setattr(planner, "compile_program", compile_program)
  monkeypatch.setattr(
    programs, "resident_bytes", lambda _: {"params": 4, "optimizer": 7}
  )
  compiler, topology = planner.Compiler(), hardware.parse_topology("v5e:4x4")
  config = config_of_4b()
  first = compiler.plan(config, topology)
  assert sorted(asked) == sorted(programs.names(config))
  # Parameters among the arguments count once: 10 + 5 + 1 + 7.
  assert {row["resident_bytes"] for row in first.programs} == {23}
  for name, value, parts in (
    ("model.remat", "dots", {"update"}),
    ("train.microbatch_bundles", 16, {"update"}),
    ("rollout.prompts_at_a_time", 8, {"rollout"}),
    ("rollout.pictures_per_shard", 4, {"pictures"}),
    ("eval.batch_size", 32, {"evaluation"}),
    ("model.image_size", 448, {"pictures"}),
    ("data.prompts_per_step", 128, {"update", "rollout", "pictures"}),
    ("data.prompt_buckets", (384,), {"update", "rollout", "evaluation"}),
  ):
    asked.clear()
    compiler.plan(changing.apply_changes(config, {name: value}), topology)
    assert parts <= {programs.part_of(name) for name in asked}, name
    assert {programs.part_of(name) for name in asked} - parts <= {"pictures"}


@pytest.mark.parametrize("name", ["preference", "smoke"])
def test_programs_with_equal_relevant_settings_have_equal_arguments(name):
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  config = config_of(name)

  @functools.cache
  def shapes(config, program):
    found = programs.find(config, mesh, program)
    given = jax.tree.leaves((found.args, found.kwargs, found.kept))
    return [getattr(x, "shape", x) for x in given]

  for setting, value in (
    ("model.image_size", 96),
    ("train.microbatch_bundles", 32),
    ("data.prompts_per_step", 128),
    ("rollout.prompts_at_a_time", 32),
    ("rollout.pictures_per_shard", 4),
    ("eval.batch_size", 128),
  ):
    new = changing.apply_changes(config, {setting: value})
    for program in programs.names(config):
      relevant = [planner.relevant_settings(x, program) for x in (config, new)]
      if relevant[0] == relevant[1]:
        assert shapes(config, program) == shapes(new, program), setting


def test_a_setting_that_breaks_a_rule_is_no_advice():
  config = config_of("smoke")
  assert changing.apply_changes(config, {"train.microbatch_bundles": 7}) is None
  changed = changing.apply_changes(config, {"train.microbatch_bundles": 32})
  assert changed.train.microbatch_bundles == 32


def test_meshes_that_prompts_do_not_divide_over_are_not_advised():
  config = config_of_4b(**{"data.prompts_per_step": 8})
  found = [
    x for _, x in advise.meshes(config, hardware.parse_topology("v5e:4x4"))
  ]
  assert {x["mesh.fsdp"] for x in found} == {8, 4, 2}
  assert all(x["mesh.fsdp"] * x["mesh.tensor"] == 16 for x in found)


def test_one_device_sends_nothing_and_fsdp_sends_weights_thrice():
  topology = hardware.parse_topology("v5e:4x4")
  name = "gemma3_4b_v5p_16"
  alone = config_of(name, **{"mesh.fsdp": 1, "mesh.tensor": 1})
  assert roofline.sent_bytes(alone, topology, "train_step (text)")["ici"] == 0
  whole = {"mesh.fsdp": 8, "mesh.tensor": 1, "train.microbatch_bundles": 64}
  eight = config_of(name, **whole)
  ici = roofline.sent_bytes(eight, topology, "train_step (text)")["ici"]
  # 3.88e9 weights and the projector; gathered twice in bf16, and fp32 gradients
  # scattered once.
  size = 3.88e9 + 1152 * 2560
  # Embeddings of eight bundles per shard, and their gradients.
  rows = 8 * (2048 + 8 * 1024) * 2560 * 2 * 2
  wanted = 7 / 8 * (size * (2 * 2 + 4) + rows)
  assert ici == pytest.approx(wanted, rel=0.01)


def test_replicas_of_several_slices_reduce_over_the_network_between_them():
  config = config_of("gemma3_4b_v5p_16", **{"mesh.replica": 2})
  one, two = (
    roofline.sent_bytes(
      config, hardware.parse_topology(name), "train_step (text)"
    )
    for name in ("v5p:2x2x4", "v5p:2x2x2*2")
  )
  assert one["dcn"] == 0 < two["dcn"]
  assert one["ici"] - two["ici"] == pytest.approx(two["dcn"])


HLO = """
  %a = f32[262144,2560]{1,0} all-reduce(%x), replica_groups={}
  %b = bf16[1,10240,2560]{2,1,0} all-gather(%y), dimensions={2}
  %c = (bf16[8,8,1024,2560]{3,2,1,0}, u32[]) all-gather-start(%z)
  %f = bf16[8,8,1024,320]{3,2,1,0} all-to-all(%z), dimensions={0}
  %g = bf16[8,8,1024,640]{3,2,1,0} all-to-all(%z), dimensions={0}
%all-reduce-scatter.1 (input: f32[10240,2560]) -> f32[1280,2560] {
  %h = f32[10240,2560]{1,0} all-reduce(%input)
}
%other.2 (input: f32[4]) -> f32[4] {
  %d = f32[4]{0} all-reduce(%w)
  %e = f32[4]{0} all-reduce(%v)
"""


def test_collectives_are_read_from_a_program_the_largest_first():
  found = aot.collectives(HLO)
  assert [x.num_bytes for x in found[:2]] == [
    262144 * 2560 * 4,
    8 * 8 * 1024 * 2560 * 2,
  ]
  assert found[-1] == aot.Collective("all-reduce", "f32", (4,), 2)
  assert aot.Collective("reduce-scatter", "f32", (10240, 2560), 1) in found


def test_defects_are_what_the_sharding_plan_does_not_ask_for():
  config = config_of_4b()
  rows = [vars(x) for x in aot.collectives(HLO)]
  gradient, activations, moved = roofline.find_defects(config, rows)
  assert "262144, 2560" in gradient and "not reduce-scattered" in gradient
  assert "1024, 2560" in activations and "gathered" in activations
  # The one of 320 columns on eight shards moves rows of the embedding.
  assert "1024, 640" in moved and "resharded" in moved


def test_split_columns_of_a_gradient_are_recognized():
  """So are embedding rows with tokens and columns in one axis."""
  mesh = {"mesh.fsdp": 32, "mesh.tensor": 4}
  config = config_of("gemma3_27b_v5p_256", **mesh)

  def defects(name, *shape):
    row = {"name": name, "dtype": "bf16", "shape": shape}
    return roofline.find_defects(config, [row])

  (gradient,) = defects("all-reduce", 32, 262144 // 4, 168)
  assert "not reduce-scattered" in gradient
  # A prompt of 2,048 tokens on each of 32 shards, 168 columns of each.
  assert defects("all-to-all", 32, 2, 1024 * 168) == []
  assert defects("all-to-all", 32, 3, 1024 * 168) != []


def main_in_plan_mode(tmp_path, *flags):
  return subprocess.run(
    [
      *(sys.executable, "-m", "grpo_tpu.main", "--mode=plan"),
      f"--workdir={tmp_path}",
      *flags,
    ],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--topology=v5e:5x5"], "nearest is v5e:"),
    (["--topology=v5e:2x2"], "mesh.fsdp=4"),
    (
      ["--topology=v5e:2x2", "--config.mesh.tensor=3"],
      "a divisor of 1024: the nearest below is mesh.tensor=2",
    ),
  ],
  ids=["absurd", "mesh", "indivisible"],
)
def test_an_impossible_request_is_exit_64(tmp_path, flags, message):
  done = main_in_plan_mode(tmp_path, "--config=configs/smoke.py", *flags)
  assert done.returncode == 64
  assert message in done.stderr


def test_the_programs_of_learning_from_preferences_are_all_there():
  """Evaluation scores eval groups, and completes eval prompts."""
  config = config_of("preference")
  assert programs.names(config) == [
    *("pictures (image)", "score (text)", "score (image)"),
    *("train_step (text)", "train_step (image)"),
    *("evaluation_prefill (image)", "evaluation_decode"),
    "evaluation_score (image)",
  ]
  never = config_of("preference", **{"eval.every_steps": 0})
  parts = {programs.part_of(name) for name in programs.names(never)}
  assert parts == {"update"}


def test_eval_groups_are_scored_one_whole_batch_at_a_time():
  config = config_of("preference", **{"eval.batch_size": 128})
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  found = programs.find(config, mesh, "evaluation_score (image)")
  _, _, bundles = found.args
  assert bundles.completion_ids.shape == (128, 2, 6)
  assert found.kwargs == {"num_microbatches": 1}
  assert set(found.bytes_by_class()) == {"reference", "batch"}
  # A step scores its batch in microbatches.
  scored = programs.find(config, mesh, "score (image)")
  assert scored.args[2].completion_ids.shape == (64, 2, 6)
  moved = {
    name: roofline.sent_bytes(
      changing.apply_changes(config, {"mesh.fsdp": 2}),
      hardware.parse_topology("v5e:2x2"),
      name,
    )["ici"]
    for name in ("score (image)", "evaluation_score (image)")
  }
  # Weights once, and the activations of twice as many bundles.
  assert moved["score (image)"] < moved["evaluation_score (image)"]
  assert moved["evaluation_score (image)"] < 2 * moved["score (image)"]


@pytest.mark.aot
def test_the_smoke_config_is_planned(tmp_path, libtpu):
  done = main_in_plan_mode(
    tmp_path,
    "--config=configs/smoke.py",
    "--topology=v5e:2x2",
    "--config.mesh.fsdp=4",
  )
  assert done.returncode == 0, done.stderr
  made = json.loads((tmp_path / "plan.json").read_text())
  assert made["fits"]
  names = [row["name"] for row in made["programs"]]
  assert names == [
    *("pictures (image)", "prefill (text)", "prefill (image)", "decode_chunk"),
    *("results", "train_step (text)", "train_step (image)"),
    *("evaluation_prefill (image)", "evaluation_decode"),
  ]
  for row in made["programs"]:
    assert 0 < row["hbm_bytes"] < row["hbm_limit_bytes"]
    assert row["flops"] > 0 or row["name"] == "results"
    assert sum(row["bytes_by_class"].values()) >= row["hbm_bytes"]
  assert "fits: " in done.stdout


def test_every_mesh_that_is_named_makes_settings_that_hold():
  """The mesh divides batches and model axes."""
  for name in ("gemma3_4b_v5e_16", "gemma3_27b_v5p_256"):
    config = config_of(name)
    for chip in (hardware.CHIPS["v6e"], hardware.CHIPS["tpu7x"]):
      for shape in chip.shapes:
        described = hardware.parse_topology(f"{chip.name}:{shape}")
        changes = changing.nearest_mesh(config, described)
        new = changing.apply_changes(config, changes)
        changing.check_mesh(new, described)
        smaller = changing.drop_unchanged(config, changes).keys() - {
          "mesh.fsdp"
        }
        assert new.mesh.tensor == config.mesh.tensor or smaller


@pytest.mark.aot
@pytest.mark.nightly
def test_learning_from_preferences_is_planned(tmp_path, libtpu):
  done = main_in_plan_mode(
    tmp_path,
    "--config=configs/preference.py",
    "--topology=v5e:2x2",
    "--config.mesh.fsdp=4",
  )
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / "plan.json").read_text())["programs"]
  (scored,) = [x for x in rows if x["name"] == "evaluation_score (image)"]
  assert scored["hbm_bytes"] > scored["bytes_by_class"]["reference"] > 0
  assert scored["flops"] > 0


@pytest.mark.aot
@pytest.mark.nightly
def test_a_config_that_does_not_fit_is_exit_64_with_one_that_does(
  tmp_path, libtpu
):
  """Activations of all prompts do not fit; those of a few do."""
  flags = [
    "--config=configs/smoke.py:warm_start",
    "--topology=v5e:1x1",
    "--config.data.prompts_per_step=16384",
    "--config.train.microbatch_bundles=16384",
    "--config.model.remat=none",
  ]
  done = main_in_plan_mode(tmp_path, *flags)
  assert done.returncode == 64, done.stderr
  assert "must have room for train_step (" in done.stderr
  remedy = done.stderr.partition("it fits with ")[2].splitlines()[0]
  again = main_in_plan_mode(tmp_path, *flags, *shlex.split(remedy))
  assert again.returncode == 0, again.stderr
  assert "\nfits: " in again.stdout


@pytest.mark.aot
@pytest.mark.nightly
def test_advice_for_the_smoke_config_fits_as_it_is_pasted(tmp_path, libtpu):
  flags = ["--config=configs/smoke.py", "--topology=v5e:2x2"]
  done = main_in_plan_mode(tmp_path, *flags, "--advise")
  assert done.returncode == 0, done.stderr
  advice_line = next(
    line for line in done.stdout.splitlines() if "--config." in line
  )
  made = json.loads((tmp_path / "plan.json").read_text())
  assert made["room"] >= MARGIN
  again = main_in_plan_mode(tmp_path, *flags, *shlex.split(advice_line))
  assert again.returncode == 0, again.stderr
  assert json.loads((tmp_path / "plan.json").read_text()) == made | {
    "programs": unittest.mock.ANY
  }


@pytest.mark.aot
@pytest.mark.nightly
@pytest.mark.parametrize("program", ["decode_chunk", "move"])
def test_memory_before_code_is_that_of_the_whole_compilation(libtpu, program):
  """Equal to the byte; the code takes some megabytes more.

  The peak in a whole compilation also counts other memories, so it may exceed
  the allocation.
  """
  name, topology = "gemma3_4b_v5e_16", "v5e:4x4"
  config, described = config_of(name), hardware.parse_topology(topology)
  quick = planner.compile_program(config, described, program)["hbm_bytes"]
  code = (
    "import json, sys\n"
    "from grpo_tpu.config import schema\n"
    "from grpo_tpu.distributed import hardware\n"
    "from grpo_tpu.planning import programs\n"
    "values, topology, name = json.load(sys.stdin)\n"
    "config = schema.Config.from_config_dict(values)\n"
    "topology = hardware.parse_topology(topology)\n"
    "mesh = programs.described_mesh(config, topology)\n"
    "traced = programs.find(config, mesh, name).trace(mesh)\n"
    "whole = traced.lower().compile().memory_analysis()\n"
    "code = whole.generated_code_size_in_bytes\n"
    "print(whole.total_allocation_bytes, code)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    input=json.dumps([config.to_dict(), topology, program]),
    cwd=ROOT,
    env=os.environ | aot.ENVIRONMENT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  allocated, code = map(int, done.stdout.split())
  assert quick == allocated
  assert quick == pytest.approx(allocated + code, rel=0.02)


@pytest.mark.aot
@pytest.mark.nightly
def test_moving_rows_takes_two_copies_and_no_more(libtpu):
  """One copy in the old grid and one in the new."""
  config, described = (
    config_of("gemma3_4b_v5e_16"),
    hardware.parse_topology("v5e:4x4"),
  )
  found = planner.compile_program(config, described, "move")
  assert found["hbm_bytes"] == pytest.approx(found["rest_bytes"], rel=0.02)


@pytest.mark.aot
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_an_overlay_fits_with_a_margin(libtpu, name, kind):
  """With rollout and training resident, and images of both sizes."""
  described = hardware.parse_topology(TOPOLOGIES[name])
  sizes = [config_of(name, kind, **{"model.image_size": x}) for x in (896, 448)]
  compiler = planner.Compiler()
  for config in sizes:
    made = compiler.plan(config, described)
    assert made.fits(MARGIN), (made.peak["name"], made.room)
