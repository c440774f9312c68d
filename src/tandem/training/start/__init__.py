"""What a run begins with, checked before the first step."""
