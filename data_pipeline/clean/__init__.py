"""Decide which documents to keep, with filters, deduplication and evaluation sets."""
