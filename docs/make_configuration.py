"""Writes configuration.md from the dataclasses: python docs/make_configuration.py > docs/configuration.md"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any

from data_pipeline.config import BuildConfig
from ponder_scale.config import RunConfig
from ponder_scale.figures import bound
from ponder_scale.settings import MISSING, known_keys

HEAD = """# Configuration

This page lists every key of a training run (`ponder-scale train RECIPE key=value ...`) and of a corpus
(`ponder-data build`). `python docs/make_configuration.py` makes it from the code, and a test keeps it current.

A recipe is a YAML file with these keys, nested at the dots. Overrides `key=value` win over the recipe, and later ones
over earlier ones. If you mistype a key, the error names the nearest right one. `null` switches a key off or does what
its description says.

- **Base.** A recipe may begin with `base: other.yaml`. We look for that file in the folder of the recipe. The keys of
  your recipe win over those of the base, by the rules for overrides below.
- **Text.** Text and choices are taken as you type them. `run_dir=0123`, `run_dir="exp #2"` and `log.wandb=off` mean
  these very words, in overrides and in recipes. In a recipe, ` #` begins a comment and quotes are not part of the text.
- **Paths.** `~` becomes your home folder. `$NAME` and `${NAME}` become the environment variable. A variable that is
  not set is refused.
- **Lists and mappings.** An override sets a list or a mapping as a whole. `data.sources={web: {path: DIR}}` replaces
  all sources, and `model.extra={}` empties a mapping. Name one entry with dots: `data.sources.web.weight=2` or
  `data.phases.0.tokens=1e9`.
- **Groups.** An override of a group of keys, such as `train={steps: 9}`, sets only the keys that it names.
- **Numbers.** Every number is finite and within the bounds of the table, also in lists and mappings.
"""

PLAIN = {str: "text", bool: "true, false", int: "whole number", float: "number"}


def rows(schema: type) -> Iterator[str]:
    """A line for each key of a dataclass, those of nested ones included."""
    for key, kind, item in known_keys(schema):
        yield f"| `{key}` | {_type(kind)} | {_default(item)} | {_text(item.metadata)} |"


def _type(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in inner if part is not type(None)) + ", null" * (type(None) in inner)
    if origin is list:
        of = _type(inner[0])
        return f"list of {of}s" if of.endswith("number") else f"list of {of}"
    if origin is dict:
        return "named entries" if dataclasses.is_dataclass(inner[1]) else "mapping"
    if dataclasses.is_dataclass(kind):
        return "entries"
    return PLAIN[kind]


def _default(item: dataclasses.Field[Any]) -> str:
    value = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
    if value == MISSING:
        return "required"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float) and "e" in str(value):
        return f"`{bound(value)}`"
    return "`null`" if value is None else f"`{value}`" if value != "" else "`''`"


def _text(metadata: Any) -> str:
    ranges = (("min", "at least {}"), ("above", "above {}"), ("max", "at most {}"), ("below", "below {}"))
    limits = [form.format(bound(metadata[name])) for name, form in ranges if metadata.get(name) is not None]
    unit = f" Unit: {metadata['unit']}." if metadata.get("unit") else ""
    path = " Path." if metadata.get("path") else ""
    limit = f" Range: {', '.join(limits)}." if limits else ""
    return f"{metadata.get('help', '')}{unit}{path}{limit}".strip().replace("|", "\\|")


def page() -> str:
    """The whole page."""
    table = "| key | values | default | meaning |\n|---|---|---|---|\n"
    run, build = "\n".join(rows(RunConfig)), "\n".join(rows(BuildConfig))
    return f"{HEAD}\n## A training run\n\n{table}{run}\n\n## A corpus\n\n{table}{build}\n"


if __name__ == "__main__":
    print(page(), end="")
