"""Preprocessed files as samples in training order."""
