"""Draws problems: pictures of our own, and texts of reasoning_gym."""
