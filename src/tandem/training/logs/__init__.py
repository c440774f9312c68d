"""The logs that a run writes and shows."""
