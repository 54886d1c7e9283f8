"""What a run reports: metrics, dashboard, samples, run.json and how it ended."""
