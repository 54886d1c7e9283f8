"""Checkpoints: written, verified, read back, kept and exported."""
