"""Checkpoints: saved whole or not at all, found, verified, read."""
