"""The loop: schedule, step, evaluation, saving, logging. Knows no framework and no parallelism."""
