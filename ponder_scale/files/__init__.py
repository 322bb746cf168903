"""Delete files, check links, and test whether a place can be written."""
