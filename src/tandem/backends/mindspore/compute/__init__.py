"""The kernels that MindSpore computes with, for each device."""
