"""Pretraining of pondering language models: from shards to a Hugging Face folder.

What stands here is for programs of yours. Each name is loaded when it is first used, so that `import ponder_scale`
loads neither torch nor anything else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ponder_scale.version import __version__

if TYPE_CHECKING:
    from ponder_scale.config import RunConfig, load_recipe
    from ponder_scale.errors import UserError
    from ponder_scale.evaluate.generate import load_folder
    from ponder_scale.export.huggingface import export as export_run
    from ponder_scale.setup.build import make_model
    from ponder_scale.shards.format import ShardSet, open_shards
    from ponder_scale.train.launch import train_run

_HOMES = {  # by which name of which module
    "RunConfig": ("config", "RunConfig"),
    "ShardSet": ("shards.format", "ShardSet"),
    "UserError": ("errors", "UserError"),
    "export_run": ("export.huggingface", "export"),
    "load_folder": ("evaluate.generate", "load_folder"),
    "load_recipe": ("config", "load_recipe"),
    "make_model": ("setup.build", "make_model"),
    "open_shards": ("shards.format", "open_shards"),
    "train_run": ("train.launch", "train_run"),
}

__all__ = [
    "RunConfig",
    "ShardSet",
    "UserError",
    "__version__",
    "export_run",
    "load_folder",
    "load_recipe",
    "make_model",
    "open_shards",
    "train_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module, attribute = _HOMES[name]
    globals()[name] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
