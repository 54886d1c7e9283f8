"""GRPO: advantages, the objective, scoring and the optimizer update."""
