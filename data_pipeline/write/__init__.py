"""Write tokens to a sealed folder of shards."""
