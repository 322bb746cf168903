"""Pretraining of pondering language models: from shards to a Hugging Face folder."""
