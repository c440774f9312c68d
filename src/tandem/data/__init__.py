"""Text to templates to tokens to `.bin/.idx` to samples to batches. NumPy only."""
