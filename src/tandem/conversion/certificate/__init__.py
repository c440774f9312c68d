"""The certificate of an export: what training computes on fixed prompts, and who computes something else."""
