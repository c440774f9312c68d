"""What a run writes, and what it keeps of it."""
