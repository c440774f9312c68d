"""Megatron's `torch` checkpoints, as Megatron-LM and MindSpeed-LLM write them."""
