"""Where things live: layer placement and the slice of each tensor that a rank holds. NumPy only."""
