"""`ponder-data`: corpora to token shards. Never imports torch."""
