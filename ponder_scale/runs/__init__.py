"""A run as seen from outside: its records, its state, its way to Slurm. No torch, for login nodes."""
