"""Declare a setting with `knob`, and turn a configuration into plain values."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

import yaml


def knob(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
    path: bool = False,
) -> Any:
    """A dataclass field with its documentation and bounds.

    Args:
        min, max: inclusive bounds. For a list or named numbers they apply to each entry. None stands for "off" and is
            never compared. A number that is not finite is always refused.
        above, below: exclusive bounds.
        path: the text is a path, in which ~ and $NAMES are expanded.
    """
    bounds = {"min": min, "max": max, "above": above, "below": below}
    metadata = {"help": help, "unit": unit, "path": path} | bounds
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain nested values, for JSON or YAML."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved configuration as a recipe that `load` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def flat(values: dict[str, Any], group: str = "") -> dict[str, Any]:
    """The leaves of nested values by their full keys. With `group`, only that key and the keys inside it."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= {f"{key}.{rest}": leaf for rest, leaf in flat(value).items()}
        else:
            found[key] = value
    return {key: leaf for key, leaf in found.items() if not group or f"{key}.".startswith(f"{group}.")}
