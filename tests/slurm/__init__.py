import pytest

pytest.register_assert_rewrite(*(f"tests.slurm.{name}" for name in ("ends", "lab", "moves", "runs", "work")))
