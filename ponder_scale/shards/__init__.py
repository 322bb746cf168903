"""Token shards: their format, manifest and packing. numpy only."""
