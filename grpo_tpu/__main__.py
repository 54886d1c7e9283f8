"""`python -m grpo_tpu` is `python -m grpo_tpu.main`."""

from grpo_tpu.main import cli

cli()
