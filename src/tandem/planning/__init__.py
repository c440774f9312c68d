"""What a run needs, and how fast it may be, before a device is there: memory, traffic, time, and layouts that fit."""
