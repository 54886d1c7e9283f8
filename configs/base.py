"""The defaults, from which every other config starts."""

from grpo_tpu.config.defaults import get_config as get_config
