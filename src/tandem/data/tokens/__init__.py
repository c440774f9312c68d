"""Tokenizers, and text into token ids."""
