"""The model, which ships with its weights: torch and transformers only."""
