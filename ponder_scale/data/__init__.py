"""Read micro-batches from shards, in an order that follows from the step and the seed."""
