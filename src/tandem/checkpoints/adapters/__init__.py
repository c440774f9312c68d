"""Adapters: drawn anew, from and to PEFT's folders, beside the weights that they change, and merged into them."""
