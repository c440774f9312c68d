"""Tandem: train Qwen3 end to end on MindSpore and on PyTorch, from the same bytes."""

__version__ = "0.2.0"
