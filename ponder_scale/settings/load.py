"""Load a configuration: read a recipe, apply the overrides in their order, then check types and bounds."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from ponder_scale.errors import ConfigError
from ponder_scale.settings.spelling import check_names, kind_at
from ponder_scale.settings.tree import NULL, Listing, Mapping, Scalar, Tree, describe, from_plain, parse, read_recipe
from ponder_scale.settings.values import build, is_scalar, is_text, list_in, optional

T = TypeVar("T")
BASE = "base"  # the key of a recipe that names another recipe to start from


def load(schema: type[T], recipe: Path | None, overrides: Sequence[str] = ()) -> T:
    """Read the recipe, apply the overrides in their order, and check the result against `schema` and its bounds.

    An override sets only the key or entry that it names. A list or a mapping of named entries is replaced as a whole.
    A recipe with `base: FILE` overrides the recipe in FILE by the same rule.

    Raises ConfigError for a recipe that cannot be read, and for a key that is unknown (the message names the nearest
    right one), missing, of the wrong type or out of bounds.
    """
    tree = Mapping() if recipe is None else _based(schema, recipe)
    for override in overrides:
        _override(schema, tree, override)
    return build(schema, tree)


def from_dict(schema: type[T], values: dict[str, Any]) -> T:
    """Rebuild the configuration that `to_dict` turned into plain values, for example those in a checkpoint."""
    tree = from_plain(values, "saved configuration")
    if not isinstance(tree, Mapping):
        raise ConfigError("saved configuration: expected keys and values")
    check_names(schema, tree)
    return build(schema, tree)


def find_recipe(name: str, shipped: Path) -> Path:
    """Find a recipe file by its path, or by its name in the folder `shipped`."""
    for candidate in (Path(name), shipped / name, shipped / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    if "=" in name:
        raise ConfigError(f"expected a recipe before {name}; give a YAML file or the name of a shipped recipe")
    known = sorted(path.stem for path in shipped.glob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; give a path to a YAML file or one of: {', '.join(known)}"
    raise ConfigError(f"recipe {name}: no such file{hint}")


def _based(schema: type, recipe: Path, above: tuple[Path, ...] = ()) -> Mapping:
    """The content of a recipe merged over that of its base. A base is a path relative to the folder of the recipe."""
    tree = read_recipe(recipe)
    said = tree.entries.pop(BASE, None)
    check_names(schema, tree)
    if said is None:
        return tree
    if not isinstance(said, Scalar) or said.is_null or not said.text:
        raise ConfigError(f"recipe {recipe}: {BASE} is {describe(said)}; expected the file of another recipe")
    file = recipe.parent / said.text
    if not file.is_file():
        raise ConfigError(f"{said.origin}: {BASE} is {said.text}; there is no file {file}")
    if any(file.samefile(seen) for seen in (*above, recipe)):
        raise ConfigError(f"{said.origin}: {BASE} is {said.text}, which is based on this recipe; remove one of the two")
    under = _based(schema, file, (*above, recipe))
    for name, value in tree.entries.items():
        if isinstance(value, Mapping) and _is_group(schema, name):
            _merge(under, name, value, name, schema)
        else:
            under.entries[name] = value
    return under


def _override(schema: type, tree: Mapping, override: str) -> None:
    """Apply `key=value` to a tree."""
    origin = f"override {override!r}"
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"{origin}: expected key=value, for example train.steps=100")
    kind = kind_at(schema, key, origin)
    value = _value(kind, text, origin)
    check_names(schema, value, key)
    *groups, last = key.split(".")
    place: Tree = tree
    for depth in range(len(groups)):
        place = _enter(schema, place, ".".join(groups[: depth + 1]), origin)
    if isinstance(place, Listing):
        place.entries[_index(place, last, ".".join(groups), origin)] = value
        return
    assert isinstance(place, Mapping)
    if _is_group(schema, key):
        if not isinstance(value, Mapping) or not value.entries:
            raise ConfigError(f"{origin}: {key} is a group of keys; name the keys to set, such as {key}={{KEY: VALUE}}")
        _merge(place, last, value, key, schema)
    else:
        place.entries[last] = value


def _merge(place: Mapping, name: str, value: Mapping, key: str, schema: type) -> None:
    """Set the named keys of a group and keep all others."""
    group = place.entries.setdefault(name, Mapping({}, value.origin))
    if not isinstance(group, Mapping):
        place.entries[name] = value
        return
    for inner, entry in value.entries.items():
        if isinstance(entry, Mapping) and _is_group(schema, f"{key}.{inner}"):
            _merge(group, inner, entry, f"{key}.{inner}", schema)
        else:
            group.entries[inner] = entry


def _is_group(schema: type, key: str) -> bool:
    """Whether a key is a fixed group of keys, such as train. A value or a named entry of a mapping is not."""
    kind: Any = schema
    for name in key.split("."):
        if not dataclasses.is_dataclass(kind):
            return False
        kind = kind_at(kind, name, "")  # type: ignore[arg-type]
    return dataclasses.is_dataclass(kind)


def _value(kind: Any, text: str, origin: str) -> Tree:
    """The value after the =. It is kept as typed if the key takes a word or a number, and parsed as YAML otherwise."""
    if is_scalar(kind):
        if list_in(kind) and (listed := _listed(text, origin)) is not None:
            return listed
        empty = text.strip() in (*NULL, "~") and not is_text(kind)
        return Scalar(text, origin, is_null=empty or (optional(kind) and text in NULL), quoted=True)
    if kind is not Any:
        return parse(text, origin)
    try:
        return parse(text, origin)
    except ConfigError:  # *.py and {a are not YAML, so keep them as text
        return Scalar(text, origin, quoted=True)


def _listed(text: str, origin: str) -> Listing | None:
    """A list of at least two entries, for a key that takes text too. [ab]*.txt and [x] stay globs."""
    try:
        tree = parse(text, origin) if text.strip().startswith("[") else None
    except ConfigError:
        return None
    return tree if isinstance(tree, Listing) and len(tree.entries) > 1 else None


def _enter(schema: type, place: Tree, key: str, origin: str) -> Tree:
    """The mapping or list on the way to a key. Creates it if it does not exist yet."""
    group, _, name = key.rpartition(".")
    if isinstance(place, Listing):
        entries: Any = place.entries
        at: Any = _index(place, name, group, origin)
        found = entries[at]
    else:
        assert isinstance(place, Mapping)
        entries, at = place.entries, name
        found = place.entries.get(name)
    if not isinstance(found, (Mapping, Listing)):
        found = entries[at] = Listing([], origin) if list_in(kind_at(schema, key, origin)) else Mapping({}, origin)
    return found


def _index(place: Listing, name: str, key: str, origin: str) -> int:
    if not name.isdecimal() or int(name) >= len(place.entries):
        raise ConfigError(
            f"{origin}: {key} has {len(place.entries)} entries, counted from 0; give the whole list to make it longer"
        )
    return int(name)
