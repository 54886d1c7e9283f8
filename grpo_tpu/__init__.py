"""GRPO post-training of Gemma 3, text and vision, on TPUs."""
