"""Gemma 3: its arithmetic over a stacked parameter tree."""
