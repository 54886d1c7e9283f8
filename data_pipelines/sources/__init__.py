"""Sources of problems: one module each, and what they share."""
