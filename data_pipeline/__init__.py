"""`ponder-data` turns corpora into token shards. It never imports torch."""
