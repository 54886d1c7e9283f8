"""Preference pairs: completions of one prompt with labels."""
