"""What the tasks of one stage say of themselves when they are done: a file each, whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson


class Journals:
    """The journals of a stage, in its folder: task 12 is done when 000012.json is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, task: int) -> Path:
        """Where a task leaves its journal."""
        return self.folder / f"{task:06d}.json"

    def done(self) -> set[int]:
        """The tasks that have one."""
        return {int(path.stem) for path in self.folder.glob("*.json")}

    def of(self, task: int) -> dict[str, Any]:
        """What a task that is done has left."""
        content: dict[str, Any] = orjson.loads(self.path(task).read_bytes())
        return content
