"""Commands that train until a test ends them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.train.survive.commands import Command


@pytest.fixture
def command(shards: Any, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    started: list[Command] = []

    def start(*more: str, **options: Any) -> Command:
        started.append(Command(tmp_path / "run", shards, *more, **options))
        return started[-1]

    yield start
    for some in started:
        some.close()
