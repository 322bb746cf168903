"""Which documents are kept: filters, duplicates, evaluation sets."""
