"""Bytes on disk, one tensor at a time: safetensors and torch's files."""
