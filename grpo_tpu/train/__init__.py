"""The training run: set-up, the loop and its three verbs."""
