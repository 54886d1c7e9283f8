"""Processes, devices and the mesh: start-up, sharding and failures."""
