"""Loading settings: frozen dataclasses, filled from a YAML recipe and `key=value` overrides.

Generic: the schema of a run is in `config`, that of the data pipeline in its own package. The only user of OmegaConf.
A field is made by `knob`, which holds its help text, unit and bounds; `load` checks them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING as MISSING  # of a key that a recipe or an override has to give
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from ponder_scale.errors import ConfigError

T = TypeVar("T")


def knob(
    default: Any,
    help: str,
    *,
    unit: str | None = None,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its documentation and bounds.

    `min` and `max` are inclusive, `above` is exclusive; None stands for "off" and is never compared.
    """
    metadata = {"help": help, "unit": unit, "min": min, "max": max, "above": above}
    if isinstance(default, (list, dict)) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


def load(schema: type[T], recipe: Path | None, overrides: Sequence[str] = ()) -> T:
    """The recipe with the overrides applied, checked against `schema` and its bounds.

    Raises ConfigError for an unreadable recipe and for a key that is unknown (the nearest right one is named),
    missing, of the wrong type or out of bounds.
    """
    base = OmegaConf.structured(schema)
    OmegaConf.set_readonly(base, False)
    layers: list[tuple[str, Any]] = [] if recipe is None else [(str(recipe), _read_yaml(recipe))]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected key=value, for example train.steps=100")
        layers.append((f"override {override!r}", [override]))
    for origin, content in layers:
        try:
            node = _from_override(*content) if isinstance(content, list) else OmegaConf.create(content)
            base = OmegaConf.unsafe_merge(base, node)  # in place: neither is used again
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {_explain(error)}") from error
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise ConfigError(f"{origin}: cannot be read: {_one_line(error)}") from error
    try:
        config = OmegaConf.to_object(base)
    except MissingMandatoryValue as error:
        where = f"{recipe}: " if recipe else ""
        raise ConfigError(f"{where}{error.full_key} is required; give it as {error.full_key}=VALUE") from error
    _check_bounds(config, "")
    return config  # type: ignore[return-value]


def _from_override(override: str) -> Any:
    try:
        return OmegaConf.from_dotlist([override])
    except yaml.YAMLError:  # *.py and {a are no YAML; they are what they look like
        key, _, value = override.partition("=")
        return OmegaConf.from_dotlist([f"{key}={json.dumps(value)}"])


def from_dict(schema: type[T], values: dict[str, Any]) -> T:
    """The configuration that `to_dict` turned into plain values (of a checkpoint, for example)."""
    try:
        base = OmegaConf.structured(schema)
        OmegaConf.set_readonly(base, False)
        return OmegaConf.to_object(OmegaConf.merge(base, OmegaConf.create(values)))  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"saved configuration: {_explain(error)}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested values of a configuration, for JSON or YAML."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """The resolved configuration as a recipe that `load` reads back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def flat(values: dict[str, Any], group: str = "") -> dict[str, Any]:
    """The leaves of nested values by their full keys, of those that are `group` or in it; {} when there are none."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= {f"{key}.{rest}": leaf for rest, leaf in flat(value).items()}
        else:
            found[key] = value
    return {key: leaf for key, leaf in found.items() if not group or f"{key}.".startswith(f"{group}.")}


def find_recipe(name: str, shipped: Path) -> Path:
    """The recipe file `name`: a path, or the name of one in the folder `shipped`."""
    for candidate in (Path(name), shipped / name, shipped / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(path.stem for path in shipped.glob("*.yaml"))) or "none"
    raise ConfigError(f"recipe {name}: no such file; give a path to a YAML file or one of: {known}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"recipe {path}: cannot be read: {_one_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"recipe {path}: expected keys and values, found a {type(content).__name__}")
    return content


def _explain(error: OmegaConfBaseException) -> str:
    """OmegaConf's message in one line, with the full key and, for an unknown key, the nearest right one."""
    message = str(error).split("\n")[0].rstrip(".")
    key = getattr(error, "full_key", None)
    if isinstance(error, ConfigKeyError):
        hint = message.partition("Did you mean: ")[2].rstrip("?")
        return f"unknown key {key}" + (f"; did you mean {hint}?" if hint else "")
    return f"{key}: {message}" if key else message


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_bounds(config: Any, prefix: str) -> None:
    for item in dataclasses.fields(config):
        value, key = getattr(config, item.name), prefix + item.name
        if dataclasses.is_dataclass(value):
            _check_bounds(value, key + ".")
        elif isinstance(value, dict):
            for name, entry in value.items():
                if dataclasses.is_dataclass(entry):
                    _check_bounds(entry, f"{key}.{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_bound(value, key, item.metadata)


def _check_bound(value: float, key: str, bounds: Any) -> None:
    low, high, above = bounds.get("min"), bounds.get("max"), bounds.get("above")
    unit = f" {bounds['unit']}" if bounds.get("unit") else ""
    if low is not None and not value >= low:
        raise ConfigError(f"{key} is {value}; expected at least {low}{unit}")
    if high is not None and not value <= high:
        raise ConfigError(f"{key} is {value}; expected at most {high}{unit}")
    if above is not None and not value > above:
        raise ConfigError(f"{key} is {value}; expected more than {above}{unit}")
