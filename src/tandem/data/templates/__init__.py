"""Conversations into text, with what is trained marked."""
