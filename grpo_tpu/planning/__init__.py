"""Plans for a described slice: memory, FLOPs and bounds, without a TPU."""
