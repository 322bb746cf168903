"""The tests and their helpers; an assertion that fails in a helper says as much as one in a test."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite(*sorted({f"{__name__}.{path.stem}" for path in Path(__file__).parent.iterdir()}))
