"""Suggest the intended key for an unknown one. The suggestion considers all keys and other programs' names for them."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

from ponder_scale.errors import ConfigError
from ponder_scale.settings.elsewhere import ELSEWHERE, ELSEWHERE_IN_FULL
from ponder_scale.settings.tree import Listing, Mapping, Tree
from ponder_scale.settings.values import hints, list_in, optional, parts

NAME, NUMBER = "NAME", "N"  # placeholders in a key for the name of an entry and for its position in a list
_NEAR = 0.72  # lowest score to suggest a key, from 0 (nothing in common) to 1 (equal)
_SAME = 0.03  # candidates whose scores differ by less are all suggested
_SHOWN = 3


def known_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Yield each key of a schema in full, with its declared type and field. Keys of entries contain NAME or N."""
    for item in dataclasses.fields(schema):
        kind, key = hints(schema)[item.name], prefix + item.name
        if dataclasses.is_dataclass(kind):
            yield from known_keys(typing.cast(type, kind), f"{key}.")
            continue
        yield key, kind, item
        if optional(kind) and dataclasses.is_dataclass(parts(kind)[0]):
            yield from known_keys(typing.cast(type, parts(kind)[0]), f"{key}.")
        inner = typing.get_args(kind)[-1:]
        if inner and dataclasses.is_dataclass(inner[0]):
            place = NAME if typing.get_origin(kind) is dict else NUMBER
            yield from known_keys(typing.cast(type, inner[0]), f"{key}.{place}.")


def kind_at(schema: type, key: str, origin: str) -> Any:
    """The declared type of a key. Raises ConfigError for an unknown key and suggests the nearest one."""
    kind: Any = schema
    for name in key.split("."):
        kind = _within(kind, name)
        if kind is None:
            raise ConfigError(f"{origin}: {unknown(schema, key)}")
    return kind


def check_names(schema: type, tree: Tree, key: str = "") -> None:
    """Raise ConfigError if a recipe, or the value that an override gives to `key`, has a key that the schema lacks."""
    kind = kind_at(schema, key, "") if key else schema
    _check(schema, kind, tree, f"{key}." if key else "")


def unknown(schema: type, key: str) -> str:
    """The error text for an unknown key."""
    near = meant(schema, key)
    return f"unknown key {key}" + (f"; did you mean {near}?" if near else "; docs/configuration.md lists all keys")


def meant(schema: type, key: str) -> str:
    """The known key or keys nearest to an unknown one, joined by "or". Empty if none is near."""
    given = key.lower().replace("-", "_").split(".")
    scores: dict[str, float] = {}
    for known, _, _ in known_keys(schema):
        words = known.split(".")
        if len(words) == len(given):
            words = [typed if word in (NAME, NUMBER) else word for word, typed in zip(words, given, strict=True)]
        full = ".".join(words)
        scores[full] = _score(given, words)
    best = max(scores.values())
    if best < _NEAR:
        return ""
    found = sorted((full for full in scores if scores[full] > best - _SAME), key=lambda full: -scores[full])
    return " or ".join(found[:_SHOWN])


def _score(given: list[str], words: list[str]) -> float:
    """Score a known key. An equal last word counts most, then a name from another program, then similarity."""
    whole = _likeness(".".join(given), ".".join(words))
    if given[-1] == words[-1]:
        return 1.0 + 0.05 * whole
    elsewhere = f"{ELSEWHERE.get(words[-1], '')} {ELSEWHERE_IN_FULL.get('.'.join(words), '')}"
    if given[-1] in elsewhere.split():
        return 0.95 + 0.05 * whole
    if given[:-1] == words[:-1]:  # a typo in a key of the same group: the group's name must not add to the score
        return 0.95 * _likeness(given[-1], words[-1])
    return 0.9 * max(whole, _likeness(given[-1], words[-1]))


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other, autojunk=False).ratio()


def _within(kind: Any, name: str) -> Any:
    """The declared type of the entry `name`; None if there can be no such entry."""
    if len(parts(kind)) != 1:
        return typing.get_args(list_in(kind))[0] if list_in(kind) and name.isdecimal() else None
    (main,) = parts(kind)
    if dataclasses.is_dataclass(main):
        return hints(typing.cast(type, main)).get(name)
    origin, inner = typing.get_origin(main), typing.get_args(main)
    if main is Any:
        return Any
    if origin is list:
        return inner[0] if name.isdecimal() else None
    return inner[1] if origin is dict and name else None


def _check(schema: type, kind: Any, tree: Tree, prefix: str) -> None:
    if isinstance(tree, Mapping) and kind is not Any:
        for name, entry in tree.entries.items():
            inner = _within(kind, name)
            if not name and typing.get_origin(parts(kind)[0]) is dict:
                origin = entry.origin or tree.origin
                raise ConfigError(f"{origin}: {prefix[:-1]} has an entry named ''; use letters, digits, - and _")
            if inner is None and dataclasses.is_dataclass(parts(kind)[0]):
                raise ConfigError(f"{entry.origin or tree.origin}: {_nested(schema, prefix + name)}")
            if inner is not None:
                _check(schema, inner, entry, f"{prefix}{name}.")
    if isinstance(tree, Listing) and typing.get_origin(parts(kind)[0]) is list:
        for number, entry in enumerate(tree.entries):
            _check(schema, _within(kind, str(number)), entry, f"{prefix}{number}.")


def _nested(schema: type, key: str) -> str:
    """The error text for an unknown key in a recipe. A key written with dots is right only in an override."""
    try:
        kind_at(schema, key, "")
    except ConfigError:
        return unknown(schema, key)
    return f"{key} is written with dots; in a recipe keys are nested: {key.replace('.', ': {', 1)}: ...}}"
