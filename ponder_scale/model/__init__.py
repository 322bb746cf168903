"""The model, whose code ships with its weights and needs only torch and transformers."""
