"""Reports of a run: metrics, dashboard, samples, run.json, exit report."""
