"""Where the files are that come with the packages and are no code: recipes, DeepSpeed files, Slurm templates.

`_files` holds links to the folders of a clone. A wheel has copies of these folders in their place, so that both are
found in the same way.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

PACKAGE = Path(str(resources.files("ponder_scale")))
RECIPES = PACKAGE / "recipes"
LINKS = "_files"
DEEPSPEED_CONFIGS = (PACKAGE / LINKS / "deepspeed_configs").resolve()
SLURM = (PACKAGE / LINKS / "slurm").resolve()
