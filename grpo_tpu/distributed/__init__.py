"""Processes, devices and the mesh: start-up, sharding, agreement and failure."""
