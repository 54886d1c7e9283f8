"""The programs of a run and their arguments."""

import functools

import jax
import pytest

from grpo_tpu.distributed import hardware, sharding
from grpo_tpu.planning import changes as changing
from grpo_tpu.planning import flops, planner, programs, roofline
from tests.grpo_tpu.planning.planning_cases import (
  config_of,
  config_of_4b,
)


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
    ("eval.num_samples", 8, {"evaluation"}),
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
    ("eval.num_samples", 3),
  ):
    new = changing.apply_changes(config, {setting: value})
    for program in programs.names(config):
      relevant = [planner.relevant_settings(x, program) for x in (config, new)]
      if relevant[0] == relevant[1]:
        assert shapes(config, program) == shapes(new, program), setting


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


def test_the_evaluation_is_planned_with_its_samples():
  """Their caches are the larger ones; the prompts are cached once."""
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  found = {
    n: programs.find(
      config_of("smoke", **{"eval.num_samples": n}), mesh, "evaluation_decode"
    )
    for n in (0, 4)
  }
  rows = [x.args[2].shape for x in found.values()]
  assert rows == [(256, 1), (256, 4)]
  greedy, sampled = (x.bytes_by_class()["caches"] for x in found.values())
  assert greedy < sampled < 4 * greedy
  assert (
    found[4].bytes_by_class()["params"] == (found[0].bytes_by_class()["params"])
  )


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


def test_weights_trained_in_bfloat16_have_masters_in_the_plan():
  """Four bytes beside each two of the decoder, and the moments as before."""
  mesh = {"mesh.fsdp": 4, "mesh.tensor": 2}
  config = config_of_4b(**mesh, **{"model.param_dtype": "bfloat16"})
  short = programs.resident_bytes(config)
  full = programs.resident_bytes(config_of_4b(**mesh))
  assert "masters" not in full
  assert short["optimizer"] == full["optimizer"]
  assert short["params"] == full["params"] - short["masters"] / 2
  # The image tower and the projector are float32 already.
  assert 0.8 * full["params"] < short["masters"] < full["params"]
  program = programs.find(
    config, sharding.make_mesh(1, 4, 2), "train_step (text)"
  )
  sizes = program.bytes_by_class()
  for name in ("params", "masters", "optimizer"):
    assert sizes[name] == short[name]


@pytest.mark.parametrize(
  "name",
  [
    "gemma3_4b_v5e_16",
    "gemma3_4b_v6e_16",
    "gemma3_4b_v5p_16",
    "gemma3_12b_v5p_64",
    "gemma3_27b_v5p_256",
    "gemma3_27b_v6e_256",
  ],
)
def test_overlays_train_float32_weights_or_adapters(name):
  """Bfloat16 is the type of frozen weights alone, so none has masters."""
  full, lora = config_of(name, "full"), config_of(name, "lora")
  assert full.model.param_dtype == "float32"
  assert lora.model.param_dtype == "bfloat16" and lora.lora
  for config in (full, lora):
    assert "masters" not in programs.resident_bytes(config)


def test_a_plan_has_as_many_images_in_a_prompt_as_the_setting_says():
  """Pixels or features; text programs have none."""
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  for trained, per_image in ((True, 3), (False, 2)):
    changes = {"data.images_per_prompt": 2, "model.train_vision": trained}
    config = config_of("smoke", **changes)
    for name, count in (("image", 2), ("text", 0)):
      _, bundles, *_ = programs.find(config, mesh, f"train_step ({name})").args
      assert bundles.images.shape[:2] == (64, count)
      if count:
        assert len(bundles.images.shape) == 2 + per_image
    _, prompts, *_ = programs.find(config, mesh, "prefill (image)").args
    assert prompts.images.shape[:2] == (64, 2)
    # A frozen tower has encoded what prompts show, whichever have them.
    assert ("train_step (mixed)" in programs.names(config)) == trained


def test_a_mixed_update_encodes_half_as_many_images():
  mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
  changes = {"data.images_per_prompt": 2, "train.microbatch_bundles": 16}
  config = config_of("smoke", **changes)
  work = []
  for name in ("text", "mixed", "image"):
    traced = programs.find(config, mesh, f"train_step ({name})").trace(mesh)
    work.append(flops.count_jaxpr(traced.jaxpr))
  text, mixed, image = work
  # The tower of `smoke` saves its forward pass, and then runs it twice: four
  # passes in place of three for half of the images.
  assert 0.6 < (mixed - text) / (image - text) < 0.8


@pytest.mark.parametrize("train_vision", [True, False], ids=["tower", "frozen"])
def test_a_reward_model_is_planned_without_a_policys_programs(train_vision):
  changes = {
    "model.train_vision": train_vision,
    "shaping.top_entropy_share": 0.5,
    "train.num_iterations": 2,
  }
  config = config_of("smoke", "reward_model", **changes)
  assert programs.names(config) == [
    *["pictures (image)"] * (not train_vision),
    *("train_step (text)", "train_step (image)"),
    "evaluation_score (image)",
  ]
  assert not programs.resident_bytes(config)["reference"]
  mesh = sharding.make_mesh(
    replica=1, fsdp=1, tensor=1, devices=jax.devices()[:1]
  )
  scored, updated = (
    programs.find(config, mesh, f"{name} (image)").trace(mesh).out_info
    for name in ("evaluation_score", "train_step")
  )
  assert scored.shape == (256, 4)
  assert "pairwise_accuracy" in updated[1] and "entropy" not in updated[1]
