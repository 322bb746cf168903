"""What `ponder-data train-tokenizer` reads: the sources of a build's recipe, or files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.config import RECIPES, BuildConfig, SourceConfig
from data_pipeline.read.remote import is_remote
from ponder_scale.errors import ConfigError
from ponder_scale.settings import find_recipe, load

MAX_TRAINING_BYTES = 2**26  # of one text that a tokenizer learns from
MAX_BAD_FRACTION = 0.01  # bad share of the records that a tokenizer could learn from


def build_to_learn_from(
    inputs: Sequence[str],
    *,
    recipe: str | None,
    out: Path,
    field: str | None,
    pattern: str | None,
    exclude: Sequence[str],
    max_bad_fraction: float | None,
) -> BuildConfig:
    """A configuration with the sources of a recipe and overrides, or of files and folders.

    Args:
        inputs: files, folders and URLs; or a recipe and overrides; or the overrides of `recipe`.
        field, pattern, exclude: how to read files and folders. None takes the default.
        max_bad_fraction: None takes that of the recipe, or MAX_BAD_FRACTION without one.

    Raises:
        ConfigError: nothing to read, files beside a recipe, or a share outside 0 to 1.
    """
    inputs = list(inputs)
    if recipe is None and inputs and inputs[0].endswith((".yaml", ".yml")):
        recipe = inputs.pop(0)
    if recipe is None and inputs and all(map(_is_override, inputs)):
        recipe = ""  # overrides without a recipe
    if recipe is not None:
        files = [name for name in inputs if "=" not in name or is_remote(name)]
        if files or field or pattern:
            what = files[0] if files else "--field" if field else "--pattern"
            raise ConfigError(
                f"{what} cannot be used with a recipe, whose sources say what to read; change them with key=value"
            )
        more = [] if max_bad_fraction is None else [f"max_bad_fraction={max_bad_fraction}"]
        unused = [f"out={out}", "tokenizer=none"]
        return load(BuildConfig, find_recipe(recipe, RECIPES) if recipe else None, [*unused, *inputs, *more])
    if not inputs:
        raise ConfigError("nothing to learn from: give files and folders, or a recipe by --recipe")
    bound = MAX_BAD_FRACTION if max_bad_fraction is None else max_bad_fraction
    if not 0 <= bound <= 1:
        raise ConfigError(f"--max-bad-fraction is {bound:g}; expected 0 to 1")
    return BuildConfig(
        out=str(out),
        tokenizer="none",
        sources={name: _source(name, field, pattern, exclude) for name in inputs},
        max_document_bytes=MAX_TRAINING_BYTES,
        max_bad_fraction=bound,
    )


def _is_override(text: str) -> bool:
    return "=" in text and not is_remote(text) and not Path(text).exists()


def _source(name: str, field: str | None, pattern: str | None, exclude: Sequence[str]) -> SourceConfig:
    from data_pipeline.read.sources import kind_of  # late, because it loads what reads every kind of source

    kind = "folder" if Path(name).is_dir() else kind_of(name)
    return SourceConfig(kind=kind, path=name, field=field or "text", pattern=pattern or "**/*", exclude=list(exclude))
