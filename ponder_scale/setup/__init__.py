"""From a recipe to a model that is ready to train."""
