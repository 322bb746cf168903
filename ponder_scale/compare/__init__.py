"""Pondering against its baselines, from one recipe."""
