"""Token shards: the file format, the manifest and the packing. Depends on numpy only."""
