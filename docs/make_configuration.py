"""Writes configuration.md from the dataclasses: python docs/make_configuration.py > docs/configuration.md"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

from data_pipeline.config import BuildConfig
from ponder_scale.config import RunConfig
from ponder_scale.settings import MISSING

HEAD = """# Configuration

Every key of a training run (`ponder-scale train RECIPE key=value ...`) and of a corpus (`ponder-data build`), as the
code has them: this page is made by `python docs/make_configuration.py`, and a test keeps it current. A recipe is a YAML
file with these keys, nested at the dots; `key=value` overrides win over the recipe. An unknown key is refused, and the
nearest right one named. `null` means off, or what the description says.
"""


def rows(schema: type, prefix: str = "") -> Iterator[str]:
    """A line for each key of a dataclass, those of nested ones included."""
    types = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        kind, key = types[item.name], prefix + item.name
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from rows(kind, key + ".")
            continue
        yield f"| `{key}` | {_type(kind)} | {_default(item)} | {_text(item.metadata)} |"
        yield from _entries(kind, key)


def _entries(kind: Any, key: str) -> Iterator[str]:
    """The keys of the dataclasses in a list or by name in a dictionary."""
    inner = typing.get_args(kind)[-1:]
    if inner and dataclasses.is_dataclass(inner[0]) and isinstance(inner[0], type):
        place = "NAME" if typing.get_origin(kind) is dict else "N"
        yield from rows(inner[0], f"{key}.{place}.")


def _type(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if type(None) in inner:
        return " or ".join(_type(part) for part in inner if part is not type(None)) + ", null"
    if origin is list:
        return f"list of {_type(inner[0])}"
    if origin is dict:
        return "named entries" if dataclasses.is_dataclass(inner[1]) else "mapping"
    if dataclasses.is_dataclass(kind):
        return "entries"
    return {"str": "text", "bool": "true, false"}.get(
        getattr(kind, "__name__", ""), getattr(kind, "__name__", str(kind))
    )


def _default(item: dataclasses.Field[Any]) -> str:
    value = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
    if value == MISSING:
        return "required"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "`null`" if value is None else f"`{value}`" if value != "" else "`''`"


def _text(metadata: Any) -> str:
    parts = [metadata.get("help", "")]
    if metadata.get("unit"):
        parts.append(f"unit: {metadata['unit']}")
    bounds = (("min", "at least {:g}"), ("max", "at most {:g}"), ("above", "above {:g}"))
    parts += [form.format(metadata[name]) for name, form in bounds if metadata.get(name) is not None]
    return "; ".join(part for part in parts if part).replace("|", "\\|")


def page() -> str:
    """The whole page."""
    table = "| key | values | default | meaning |\n|---|---|---|---|\n"
    run, build = "\n".join(rows(RunConfig)), "\n".join(rows(BuildConfig))
    return f"{HEAD}\n## A training run\n\n{table}{run}\n\n## A corpus\n\n{table}{build}\n"


if __name__ == "__main__":
    print(page(), end="")
