"""Rollouts: completions sampled from prompts on the mesh."""
