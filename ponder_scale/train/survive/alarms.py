"""Alarms when pondering has collapsed. They look at the numbers that each step logs.

    pondering_idle      no pass changes the prediction: every KL from a pass to the next is below IDLE_KL nats
    pondering_uniform   the pondering softmax is almost uniform: its entropy in every pass but the last is above
                        UNIFORM_SHARE of log V, so that every token is fed the same mean embedding

An alarm is given when its sign has been there for LOGGED_STEPS logged steps in a row. It is not repeated until the sign
goes away. Steps without pondering are not counted.

Fresh weights show either sign, so no alarm is given before FIRST_STEP and during the warm-up of the learning rate.
Pondering that works starts near 0.35 nats a pass (arXiv 2505.20674).
"""

from __future__ import annotations

import math
from typing import Any

from ponder_scale.config import RunConfig

IDLE_KL = 1e-5
UNIFORM_SHARE = 0.98
LOGGED_STEPS = 5
FIRST_STEP = 200


class CollapseAlarms:
    """Looks for the signs in the logged steps of a run."""

    def __init__(self, config: RunConfig, vocabulary: int) -> None:
        self._from = max(FIRST_STEP, config.optim.warmup_steps)
        self._uniform = UNIFORM_SHARE * math.log(vocabulary)
        self._seen = {"pondering_idle": 0, "pondering_uniform": 0}

    def of(self, step: int, means: dict[str, list[float]]) -> list[dict[str, Any]]:
        """The alarms that a logged step raises, each with its kind and message."""
        if step < self._from:
            return []
        kls, entropies = means.get("pass_kls", []), means["pass_entropies"][:-1]
        if not kls:
            return []
        signs = {"pondering_idle": max(kls) < IDLE_KL, "pondering_uniform": min(entropies) > self._uniform}
        alarms = []
        for kind, present in signs.items():
            self._seen[kind] = self._seen[kind] + 1 if present else 0
            if self._seen[kind] == LOGGED_STEPS:
                alarms.append({"kind": kind, "message": self._message(kind, kls, entropies)})
        return alarms

    def _message(self, kind: str, kls: list[float], entropies: list[float]) -> str:
        if kind == "pondering_idle":
            return (
                f"pondering no longer changes a prediction: KL of at most {max(kls):.1e} nats from a pass to the next; "
                "compare pass_losses, and consider a lower learning rate or a random number of pondering steps"
            )
        return (
            f"the pondering softmax is nearly uniform: its entropy is at least {min(entropies):.2f} nats, of at most "
            f"{self._uniform / UNIFORM_SHARE:.2f}, so every token is fed about the mean embedding"
        )
