"""Weights on disk: Hugging Face folders, Megatron `torch` checkpoints, native safetensors. NumPy only."""
