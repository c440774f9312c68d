"""Processes: what the launcher says, starting a job, being in one."""
