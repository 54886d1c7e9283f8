"""Bounds by hand arithmetic, and defects in compiled programs."""

import pytest

from grpo_tpu.distributed import hardware
from grpo_tpu.planning import aot, planner, programs, roofline
from tests.grpo_tpu.planning.planning_cases import (
  config_of,
  config_of_4b,
)


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
