"""Tandem's own checkpoints."""
