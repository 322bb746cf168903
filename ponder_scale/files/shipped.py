"""The paths of files that come with the packages and are not code: recipes, DeepSpeed files, Slurm templates.

In a clone, `_files` holds links to the clone's folders. In a wheel it holds copies of them, so both are found in the
same way.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

PACKAGE = Path(str(resources.files("ponder_scale")))
RECIPES = PACKAGE / "recipes"
LINKS = "_files"
DEEPSPEED_CONFIGS = (PACKAGE / LINKS / "deepspeed_configs").resolve()
SLURM = (PACKAGE / LINKS / "slurm").resolve()
