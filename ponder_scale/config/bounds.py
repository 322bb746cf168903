"""Upper bounds that no run comes near. They tell a slip from a wish, and keep every number exact and finite."""

from __future__ import annotations

MOST_STEPS = 10**9
MOST_TOKENS = 10**16
MOST_SEQUENCES = 2**24  # of a batch
MOST_POSITIONS = 2**27
MOST_WIDTH = 2**20
MOST_VOCABULARY = 2**24
MOST_WEIGHT = 10**15  # of a source: numbers of tokens are weights, too
MOST_SECONDS = 10**7
