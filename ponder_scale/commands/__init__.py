"""The subcommands of `ponder-scale`, which cli.py puts together."""
