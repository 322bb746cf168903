"""The model. Its code ships with its weights, so it needs only torch and transformers."""
