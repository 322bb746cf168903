"""Read records from files and data sets."""
