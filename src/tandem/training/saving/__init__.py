"""Saves checkpoints, exports them, and removes old ones."""
