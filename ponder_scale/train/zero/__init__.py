"""The engine: everything that knows DeepSpeed."""
