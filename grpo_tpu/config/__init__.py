"""Settings: defaults, types, rules and flags."""
