"""The files of checkpoints, one tensor at a time: safetensors and torch's files."""
