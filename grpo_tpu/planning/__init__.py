"""Plans a run for a described slice: memory, FLOPs and bounds, without a TPU."""
