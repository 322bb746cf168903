"""The declaration of a knob, and a configuration as plain values."""

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
        min, max: inclusive bounds, of the entries where the value is a list or named numbers; None, which stands for
            "off", is never compared, and what is not finite is always refused.
        above, below: exclusive bounds.
        path: the text is a path; ~ and $NAMES are replaced in it.
    """
    bounds = {"min": min, "max": max, "above": above, "below": below}
    metadata = {"help": help, "unit": unit, "path": path} | bounds
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values of a configuration, for JSON or YAML."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved configuration as a recipe that `load` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def flat(values: dict[str, Any], group: str = "") -> dict[str, Any]:
    """The leaves of nested values by their full keys, of those that are `group` or in it; {} when there are none."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= {f"{key}.{rest}": leaf for rest, leaf in flat(value).items()}
        else:
            found[key] = value
    return {key: leaf for key, leaf in found.items() if not group or f"{key}.".startswith(f"{group}.")}
