"""From tokens to a sealed folder."""
