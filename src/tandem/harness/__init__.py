"""Benchmarks of EleutherAI's lm-evaluation-harness, asked over an engine of any layout."""
