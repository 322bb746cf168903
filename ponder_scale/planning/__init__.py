"""What a run will need and cost, before a device is touched."""
