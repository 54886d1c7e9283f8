"""What a completion is paid, and for what."""
