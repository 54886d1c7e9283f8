"""Decides whether a completion gives the right answer."""
