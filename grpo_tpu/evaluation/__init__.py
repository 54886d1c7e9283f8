"""Evaluation: accuracy and preferences on held-out problems, and the report."""
