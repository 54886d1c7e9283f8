"""Where problems come from: one module per source, and what all sources share."""
