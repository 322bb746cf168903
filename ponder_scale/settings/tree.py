"""Read a recipe as mappings and lists of scalars that keep their text as typed, so that the key decides the type.

YAML alone would read 0123 as 83, on as True, 12:30:00 as 45000 and 1e-3 as text. Here a scalar has no type until a key
of the schema gives it one (see `values`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ponder_scale.errors import ConfigError

NULL = ("null", "Null", "NULL")
_DEEPEST = 32  # levels of nesting; an alias that contains itself would never end
_STANDARD = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Scalar:
    """A value as typed. `origin` says where it was typed, for error messages."""

    text: str
    origin: str
    is_null: bool = False
    quoted: bool = False


@dataclass(frozen=True)
class Listing:
    """The entries of a list."""

    entries: list[Tree]
    origin: str


@dataclass(frozen=True)
class Mapping:
    """Named entries. `origin` says where the mapping begins, for error messages."""

    entries: dict[str, Tree] = field(default_factory=dict)
    origin: str = ""


Tree = Scalar | Listing | Mapping


class _Loader(yaml.SafeLoader):
    """YAML without the guesses of version 1.1: it knows null, true, false and decimal numbers. All else is text."""


_Loader.yaml_implicit_resolvers = {}  # drops the base class's rules, which read on as true and 0123 as 83


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
        [*"-+.0123456789"],
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_STANDARD + _tag, re.compile(f"(?:{_pattern})$"), _first)


def read_recipe(path: Path) -> Mapping:
    """Read a recipe. An empty file gives an empty mapping. Raises ConfigError if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"recipe {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path}: cannot be read: it is not UTF-8 text") from error
    tree = parse(text, f"recipe {path}", numbered=True)
    if isinstance(tree, Scalar) and tree.is_null:
        return Mapping({}, f"recipe {path}")
    if not isinstance(tree, Mapping):
        raise ConfigError(f"recipe {path}: expected keys and values, found {describe(tree)}")
    return tree


def parse(text: str, origin: str, *, numbered: bool = False) -> Tree:
    """Parse YAML and keep scalars as typed.

    Raises ConfigError with a message that begins with `origin` and, if `numbered`, names the line.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return Scalar("", origin, is_null=True)
        return _tree(loader, node, origin, numbered, _DEEPEST)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{origin}, line {mark.line + 1}" if numbered and mark is not None else origin
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{place}: cannot be read as YAML: {' '.join(str(problem).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{origin}: cannot be read as YAML: too many levels") from error
    finally:
        if loader is not None:
            loader.dispose()


def from_plain(values: Any, origin: str) -> Tree:
    """The tree of plain values, for example those of a configuration that was saved as JSON."""
    if isinstance(values, dict):
        return Mapping({str(key): from_plain(value, origin) for key, value in values.items()}, origin)
    if isinstance(values, (list, tuple)):
        return Listing([from_plain(value, origin) for value in values], origin)
    if values is None:
        return Scalar("null", origin, is_null=True)
    if isinstance(values, str):
        return Scalar(values, origin, quoted=True)
    text = str(values).lower() if isinstance(values, bool) else repr(values)
    return Scalar({"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text), origin)


def to_plain(tree: Tree) -> Any:
    """The plain values of a tree for which no key declares a type. Reads scalars as YAML does, without its guesses."""
    if isinstance(tree, Mapping):
        return {name: to_plain(entry) for name, entry in tree.entries.items()}
    if isinstance(tree, Listing):
        return [to_plain(entry) for entry in tree.entries]
    if tree.is_null or tree.quoted:
        return None if tree.is_null else tree.text
    loader = _Loader("")
    tag = loader.resolve(yaml.ScalarNode, tree.text, (True, False))
    return loader.construct_object(yaml.ScalarNode(tag, tree.text))


def describe(tree: Tree) -> str:
    """A short description of a tree, for error messages."""
    if isinstance(tree, Scalar):
        return "null" if tree.is_null else repr(tree.text)
    return "keys and values" if isinstance(tree, Mapping) else "a list"


def _tree(loader: _Loader, node: yaml.Node, origin: str, numbered: bool, depth: int) -> Tree:
    place = f"{origin}, line {node.start_mark.line + 1}" if numbered else origin
    if not depth:
        raise ConfigError(f"{place}: mappings and lists are more than {_DEEPEST} levels deep, or one contains itself")
    if not node.tag.startswith(_STANDARD):
        raise ConfigError(f"{place}: the tag {node.tag} is not known; quote the value if it is text")
    if isinstance(node, yaml.MappingNode):
        return Mapping(dict(_entries(loader, node, origin, numbered, depth)), place)
    if isinstance(node, yaml.SequenceNode):
        return Listing([_tree(loader, entry, origin, numbered, depth - 1) for entry in node.value], place)
    assert isinstance(node, yaml.ScalarNode)
    return Scalar(node.value, place, is_null=node.tag == f"{_STANDARD}null", quoted=node.style is not None)


def _entries(
    loader: _Loader, node: yaml.MappingNode, origin: str, numbered: bool, depth: int
) -> Iterator[tuple[str, Tree]]:
    merged = [key for key, _ in node.value if key.tag == f"{_STANDARD}merge"]
    seen = set()
    for key, _ in node.value:
        place = f"{origin}, line {key.start_mark.line + 1}" if numbered else origin
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{place}: a key is a mapping or a list; expected a name")
        if key.value in seen and key not in merged:
            raise ConfigError(f"{place}: {key.value} is given twice; remove one")
        seen.add(key.value)
    if merged:
        loader.flatten_mapping(node)
    for key, value in node.value:  # merged keys come first, so that the mapping's own keys win
        yield key.value, _tree(loader, value, origin, numbered, depth - 1)
