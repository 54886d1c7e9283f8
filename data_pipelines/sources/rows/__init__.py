"""Turns rows of any columns into problems."""
