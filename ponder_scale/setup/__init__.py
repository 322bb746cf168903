"""Turn a recipe into a model that is ready to train."""
