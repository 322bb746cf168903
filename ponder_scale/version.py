"""The version of both packages: pyproject.toml, `--version` and what is written into checkpoints and shards read it."""

__version__ = "0.1.0"
