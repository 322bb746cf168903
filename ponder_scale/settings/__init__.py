"""Fill frozen dataclasses from a YAML recipe and `key=value` overrides. The packages that use this own the schemas."""

from ponder_scale.settings.load import find_recipe, from_dict, load
from ponder_scale.settings.plain import flat, knob, to_dict, to_yaml
from ponder_scale.settings.spelling import known_keys, meant
from ponder_scale.settings.values import MISSING, expand_path

__all__ = [
    "MISSING",
    "expand_path",
    "find_recipe",
    "flat",
    "from_dict",
    "knob",
    "known_keys",
    "load",
    "meant",
    "to_dict",
    "to_yaml",
]
