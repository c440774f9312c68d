"""Command lines of Megatron-LM and MindSpeed-LLM scripts."""
