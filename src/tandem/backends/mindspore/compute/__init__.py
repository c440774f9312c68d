"""What MindSpore computes with, per device."""
