"""Upper bounds that no run comes near. They catch typing errors, and keep every number exact and finite."""

from __future__ import annotations

MOST_STEPS = 10**9
MOST_TOKENS = 10**16
MOST_SEQUENCES = 2**24  # in a batch
MOST_POSITIONS = 2**27
MOST_WIDTH = 2**20
MOST_VOCABULARY = 2**24
MOST_WEIGHT = 10**15  # of a source, whose number of tokens may be its weight
MOST_SECONDS = 10**7
