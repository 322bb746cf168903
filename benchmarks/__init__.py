"""Ratios against named baselines, measured in one run; not part of the package."""
