"""Converting weights from one format to another, and checking that both compute the same."""
