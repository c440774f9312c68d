"""Everything that a run starts with, checked before the first step."""
