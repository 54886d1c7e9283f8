"""Gemma 3: its sizes, its forward passes and its parameters."""
