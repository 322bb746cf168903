"""The commands of `ponder-data` besides build, and what train-tokenizer reads."""
