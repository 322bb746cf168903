"""Run a build over processes and machines."""
