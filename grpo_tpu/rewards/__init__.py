"""What a completion is paid, and for what."""

from grpo_tpu.rewards.scoring import RewardConfig as RewardConfig
