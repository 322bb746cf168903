"""Benchmarks against named baselines, with both sides measured in one run. Not part of the package."""
