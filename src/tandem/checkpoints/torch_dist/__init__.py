"""Megatron's `torch_dist` checkpoints: global tensors in the files of torch's distributed checkpoints."""
