"""MathVista-style problems: sources, prompts, and honest scoring."""
