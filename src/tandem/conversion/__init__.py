"""From one format of weights to another, and the check that both compute the same."""
