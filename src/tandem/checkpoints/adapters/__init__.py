"""Adapters: newly drawn, from and to PEFT's folders, next to the weights that they change, and merged into them."""
