"""The commands of `ponder-data` besides build: adopt, append, merge, plan, inspect, train-tokenizer."""
