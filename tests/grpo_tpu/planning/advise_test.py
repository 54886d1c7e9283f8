"""The largest step that fits, and the nearest settings that fit."""

import pytest

from data_pipelines import validation
from grpo_tpu.distributed import hardware
from grpo_tpu.models.settings import REMAT_POLICIES
from grpo_tpu.planning import advise, plan, planner
from grpo_tpu.planning import changes as changing
from tests.grpo_tpu.planning.planning_cases import (
  GIB,
  ScriptedCompiler,
  by_remat,
  by_rows,
  config_of,
  config_of_4b,
  parse_command_line,
  small_need,
)


def advised(config, topology, sampling=by_rows, update=by_remat):
  compiler = ScriptedCompiler(sampling, update)
  return advise.advise(config, hardware.parse_topology(topology), compiler)


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


def test_meshes_that_prompts_do_not_divide_over_are_not_advised():
  config = config_of_4b(**{"data.prompts_per_step": 8})
  found = [
    x for _, x in advise.meshes(config, hardware.parse_topology("v5e:4x4"))
  ]
  assert {x["mesh.fsdp"] for x in found} == {8, 4, 2}
  assert all(x["mesh.fsdp"] * x["mesh.tensor"] == 16 for x in found)
