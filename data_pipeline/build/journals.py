"""Each task of a stage leaves a journal when it is done. A journal is a file that is either whole or missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson


class Journals:
    """The journals of a stage, in the stage's folder. Task 12 is done when 000012.json exists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, task: int) -> Path:
        return self.folder / f"{task:06d}.json"

    def done(self) -> set[int]:
        """The tasks that have a journal."""
        return {int(path.stem) for path in self.folder.glob("*.json")}

    def of(self, task: int) -> dict[str, Any]:
        """Read the journal of a finished task."""
        content: dict[str, Any] = orjson.loads(self.path(task).read_bytes())
        return content
