"""Convert a recipe as typed to values of the types and within the bounds that a schema of dataclasses declares."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from functools import cache
from typing import Any

from ponder_scale.errors import ConfigError
from ponder_scale.settings.tree import Listing, Mapping, Scalar, Tree, describe, to_plain

MISSING = "???"  # the default of a key that you must give in a recipe or an override
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))")
_NUMBER = re.compile(r"[-+]?(\d[\d_]*)?\.?\d*([eE][-+]?\d+)?")
_LIST = "a list, such as [a, b]"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@cache
def hints(schema: type) -> dict[str, Any]:
    """The declared type of each field of a dataclass."""
    return typing.get_type_hints(schema)


def parts(kind: Any) -> tuple[Any, ...]:
    """The types that a declared type allows, without None."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(part for part in typing.get_args(kind) if part is not type(None))
    return (kind,)


def optional(kind: Any) -> bool:
    """Whether a declared type allows null."""
    return type(None) in typing.get_args(kind)


def is_text(kind: Any) -> bool:
    """Whether a value of the declared type is kept as typed: text or a choice."""
    return any(part is str or typing.get_origin(part) is typing.Literal for part in parts(kind))


def list_in(kind: Any) -> Any:
    """The list type among those that a declared type allows; None if it allows no list."""
    return next((part for part in parts(kind) if typing.get_origin(part) is list), None)


def is_scalar(kind: Any) -> bool:
    """Whether a value of the declared type is a single word or number."""
    return is_text(kind) or any(part in (int, float, bool) for part in parts(kind))


def build(schema: type, tree: Mapping) -> Any:
    """Build the dataclass `schema` from a tree whose keys are all known to it.

    Raises ConfigError for a value that is missing, of another type than declared, or out of bounds.
    """
    return _finished(_draft(schema, tree, ""), f"{tree.origin}: " if tree.origin else "")


@dataclasses.dataclass(frozen=True)
class _Draft:
    """The values of a dataclass before it is created. All values are checked first, so that its own checks see valid
    ones.
    """

    schema: type
    values: dict[str, Any]
    missing: str | None


def _draft(schema: type, tree: Mapping, prefix: str) -> _Draft:
    values, missing = {}, None
    for item in dataclasses.fields(schema):
        kind, key = hints(schema)[item.name], prefix + item.name
        if item.name in tree.entries:
            values[item.name] = _convert(kind, tree.entries[item.name], key, item.metadata)
        elif dataclasses.is_dataclass(kind):
            values[item.name] = _draft(typing.cast(type, kind), Mapping(), f"{key}.")
        elif isinstance(item.default, str) and item.default == MISSING:
            missing = missing or key
    return _Draft(schema, values, missing)


def _finished(value: Any, origin: str) -> Any:
    """The value with each draft in it replaced by its dataclass."""
    if isinstance(value, _Draft):
        if value.missing is not None:
            raise ConfigError(f"{origin}{value.missing} is required; give it as {value.missing}=VALUE")
        return value.schema(**_finished(value.values, origin))
    if isinstance(value, dict):
        return {name: _finished(entry, origin) for name, entry in value.items()}
    return [_finished(entry, origin) for entry in value] if isinstance(value, list) else value


def _convert(kind: Any, tree: Tree, key: str, metadata: typing.Mapping[str, Any]) -> Any:
    """Convert a tree to the declared type, or to a draft. Bounds in `metadata` apply to each entry of a list."""
    if isinstance(tree, Scalar) and tree.is_null and optional(kind):
        return None
    choices = [part for part in parts(kind) if typing.get_origin(part) is typing.Literal]
    if choices and isinstance(tree, Scalar) and tree.text in typing.get_args(choices[0]):
        return tree.text
    main = _meant(tree, [part for part in parts(kind) if part not in choices] or choices)
    origin, inner = typing.get_origin(main), typing.get_args(main)
    if main is Any:
        return to_plain(tree)
    if dataclasses.is_dataclass(main) or origin is dict:
        if not isinstance(tree, Mapping):
            raise _wrong(tree, key, "keys and values, such as {name: value}")
        if origin is None:
            return _draft(typing.cast(type, main), tree, f"{key}.")
        return {name: _convert(inner[1], entry, f"{key}.{name}", metadata) for name, entry in tree.entries.items()}
    if origin is list:
        if not isinstance(tree, Listing):
            raise _wrong(tree, key, _LIST)
        return [_convert(inner[0], entry, f"{key}.{number}", metadata) for number, entry in enumerate(tree.entries)]
    or_null = " or null" if optional(kind) else ""
    if not isinstance(tree, Scalar) or tree.is_null:
        raise _wrong(tree, key, f"{_expected(kind)}{or_null}")
    if main is str:
        return _text(tree, key, path=bool(metadata.get("path")))
    value = _read(main, tree.text.strip())
    if value is None:
        raise _wrong(tree, key, f"{_expected(kind)}{or_null}")
    if main is not bool:
        check_bounds(value, key, metadata)
    return value


def _meant(tree: Tree, kinds: list[Any]) -> Any:
    """The type that fits the form of a value, among the types that a key takes."""
    if len(kinds) == 1:
        return kinds[0]
    lists = [kind for kind in kinds if typing.get_origin(kind) is list]
    return (lists if isinstance(tree, Listing) and lists else [kind for kind in kinds if kind not in lists])[0]


def check_bounds(value: float, key: str, bounds: typing.Mapping[str, Any]) -> None:
    """Raise ConfigError for a number that is not finite or is outside the bounds of its knob."""
    low, high, above, below = (bounds.get(name) for name in ("min", "max", "above", "below"))
    unit = f" {bounds['unit']}" if bounds.get("unit") else ""
    if not math.isfinite(value):
        raise ConfigError(f"{key} is {value}; expected a finite number")
    if low is not None and value < low:
        raise ConfigError(f"{key} is {value}; expected at least {low}{unit}")
    if high is not None and value > high:
        raise ConfigError(f"{key} is {value}; expected at most {high}{unit}")
    if above is not None and value <= above:
        raise ConfigError(f"{key} is {value}; expected more than {above}{unit}")
    if below is not None and value >= below:
        raise ConfigError(f"{key} is {value}; expected less than {below}{unit}")


def expand_path(text: str, key: str) -> str:
    """Expand ~ and $NAMES in a path, so that no folder with such a literal name is created.

    Raises ConfigError for a variable or user that does not exist, and for characters that a path may not contain. `key`
    is for the message.
    """

    def value_of(match: re.Match[str]) -> str:
        name = match[2] if match[1] is None else match[1]
        found = os.environ.get(name)
        if not found:
            raise ConfigError(
                f"{key} is {text!r}: there is no environment variable {name or '${}'}; set it, or write the path out"
            )
        return found

    if not text.strip():
        raise ConfigError(f"{key} is empty; expected a path")
    path = _VARIABLE.sub(value_of, text)
    if path.startswith("~"):
        home = os.path.expanduser(path)  # noqa: PTH111 - Path.expanduser raises for a user it does not know
        if home.startswith("~"):
            raise ConfigError(f"{key} is {text!r}: there is no user {path.partition('/')[0]}; write the path out")
        path = home
    if "${" in path or _VARIABLE.search(path) or path.startswith("~"):  # a later read would expand it again
        raise ConfigError(f"{key} is {text!r}, which expands to {path!r}; expected no $NAME or leading ~ in the result")
    if _CONTROL.search(path):
        raise ConfigError(f"{key} is {text!r}: a path must not contain line breaks or control characters")
    return path


def _text(tree: Scalar, key: str, *, path: bool) -> str:
    try:
        tree.text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{key} is {tree.text!r}; expected UTF-8 text") from None
    return expand_path(tree.text, key) if path else tree.text


def _read(kind: Any, text: str) -> int | float | bool | None:
    """The number or truth value that a text spells; None if it spells neither."""
    if kind is bool:
        return True if text.lower() in _TRUE else False if text.lower() in _FALSE else None
    if re.fullmatch(r"[-+]?\.?(inf|infinity|nan)", text, re.IGNORECASE):
        return float(text.replace(".", "")) if kind in (int, float) else None
    if not _NUMBER.fullmatch(text) or len(text) > 64 or text.endswith("_") or "__" in text:
        return None
    try:
        if kind is float:
            return float(text)
        if re.fullmatch(r"[-+]?\d[\d_]*", text):
            return int(text)
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number if math.isinf(number) else None


def _expected(kind: Any) -> str:
    words = []
    for part in parts(kind):
        if typing.get_origin(part) is typing.Literal:
            words += [str(choice) for choice in typing.get_args(part)]
        elif typing.get_origin(part) is list:
            words.append(_LIST)
        else:
            words.append({int: "a whole number", float: "a number", bool: "true or false"}.get(part, "text"))
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _wrong(tree: Tree, key: str, expected: str) -> ConfigError:
    return ConfigError(f"{tree.origin}: {key} is {describe(tree)}; expected {expected}")
