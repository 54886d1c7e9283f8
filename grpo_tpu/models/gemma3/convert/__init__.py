"""Reads and writes Gemma 3 weights in other programs' formats."""
