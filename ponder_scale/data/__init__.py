"""From shards to micro-batches, in an order that a step and a seed give."""
