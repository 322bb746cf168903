"""From shards to micro-batches, in an order that step and seed give."""
