"""GGUF: one file for llama.cpp and what builds on it. It is written, and not read."""
