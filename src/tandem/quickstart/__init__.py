"""`tandem quickstart`: every step on a toy model, with questions whose answers can be checked."""
