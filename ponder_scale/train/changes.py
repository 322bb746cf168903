"""What has changed between the save of a checkpoint and the resume from it.

Most settings may change on resume. Every change is logged and recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ponder_scale.config import RunConfig
from ponder_scale.settings import flat, known_keys

# The keys of state.json that are compared, each with the prefix under which its changes are reported.
GROUPS = {"config": "", "sharding": "deepspeed.", "world_size": "", "versions": "versions.", "commit": ""}


class Change(NamedTuple):
    """A changed key of the recipe, the sharding file or the environment. None stands for null and for a missing key."""

    key: str
    before: Any
    after: Any

    def sentence(self, first_step: int) -> str:
        """The change as a sentence for the log. `first_step` is the first step that runs with the new value."""
        return f"{self.key} is {json.dumps(self.after)} from step {first_step} on; it was {json.dumps(self.before)}"


def between(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The keys whose values differ between two contents of state.json, in their order there.

    Keys that an older version did not save are skipped.
    """
    found = []
    for name, prefix in GROUPS.items():
        before, after = (_leaves(name, content.get(name)) for content in (saved, now))
        if name in saved:
            before |= {key: after[key] for key in _added(name, before, after)}
            keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
            found += [Change(prefix + key, before.get(key), after.get(key)) for key in keys]
    return found


def _added(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Keys that the recipes of an older version did not have, and that are at their defaults, which change nothing."""
    defaults = {key: item.default for key, _, item in known_keys(RunConfig)} if name == "config" else {}
    return [key for key in after if key not in before and key in defaults and after[key] == defaults[key]]


def _leaves(name: str, value: Any) -> dict[str, Any]:
    value = json.loads(json.dumps(value))  # the saved side went through JSON too
    return flat(value) if isinstance(value, dict) else {name: value}
