"""The flow of a build, over processes and machines."""
