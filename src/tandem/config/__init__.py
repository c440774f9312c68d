"""Typed settings: fields are named as Megatron's flags; from YAML and flags; saved with every run."""
