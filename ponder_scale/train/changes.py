"""What is otherwise on resume than it was when the checkpoint was saved: most may be, and none of it in silence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ponder_scale.settings import flat

# what of state.json is compared, and what its keys are called
GROUPS = {"config": "", "sharding": "deepspeed.", "world_size": "", "versions": "versions.", "commit": ""}


class Change(NamedTuple):
    """A key of the recipe, the sharding file or the surroundings; None stands for null and for what is not there."""

    key: str
    before: Any
    after: Any

    def sentence(self, first_step: int) -> str:
        """For the log; `first_step` is the first that it holds for."""
        return f"{self.key} is {json.dumps(self.after)} from step {first_step} on; it was {json.dumps(self.before)}"


def between(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The keys whose values differ between two contents of state.json, in their order there.

    What an older version has not saved is passed over.
    """
    found = []
    for name, prefix in GROUPS.items():
        before, after = (_leaves(name, content.get(name)) for content in (saved, now))
        if name in saved:
            keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
            found += [Change(prefix + key, before.get(key), after.get(key)) for key in keys]
    return found


def _leaves(name: str, value: Any) -> dict[str, Any]:
    value = json.loads(json.dumps(value))  # as a checkpoint gives it back
    return flat(value) if isinstance(value, dict) else {name: value}
