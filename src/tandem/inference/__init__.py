"""Sampling text from a model. Over the backend's logits only."""
