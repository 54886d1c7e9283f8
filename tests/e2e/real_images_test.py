"""Trains on real images: RGBA, grey, palette, PNGs named .jpg."""

import io

import PIL.Image
import pytest

from data_pipelines.sources import stored

pytestmark = pytest.mark.e2e

NUM_STEPS, PROMPTS_PER_STEP = 5, 64


def test_grpo_trains_on_every_image_of_a_mathvista_snapshot(
  program, new_run, fixtures, tmp_path
):
  data = tmp_path / "data"
  program.run(
    "data_pipelines.prepare",
    f"--source={fixtures / 'mathvista_schema'}",
    f"--data_dir={data}",
  )
  problems = stored.source(data, "train")
  # An epoch is done before the last step is.
  assert len(problems) <= NUM_STEPS * PROMPTS_PER_STEP
  images = [
    PIL.Image.open(io.BytesIO(problems[i].images[0]))
    for i in range(len(problems))
  ]
  assert {image.mode for image in images} == {"RGB", "RGBA", "L", "P"}
  assert {image.format for image in images} == {"JPEG", "PNG"}
  paths = [problems[i].image_path for i in range(len(problems))]
  assert all(path.endswith(".jpg") for path in paths)

  run = new_run(
    f"--config.data.dir={data}",
    "--config.data.prompt_buckets=(384,)",
    f"--config.data.prompts_per_step={PROMPTS_PER_STEP}",
    "--config.train.microbatch_bundles=16",
    "--config.rollout.num_generations=2",
    f"--config.train.num_steps={NUM_STEPS}",
    "--config.eval.every_steps=0",
    "--config.checkpoint.every_steps=50",
  ).start()
  assert [row["step"] for row in run.rows()] == list(range(NUM_STEPS + 1))
  assert run.column("data/skipped") == [0] * NUM_STEPS
  assert run.column("reward/errors") == [0] * NUM_STEPS
  assert all(norm > 0 for norm in run.column("train/grad_norm"))
