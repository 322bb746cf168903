"""What a run has done so far: steps, sequences, tokens, floating-point operations.

It is added up as it is done and kept in every checkpoint, never computed again from the recipe: the batch, its ramp and
the pondering schedule may be others after a resume, and what was done before stays what it was.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ponder_scale.config import RunConfig
from ponder_scale.planning.cost import Shape, step_flops
from ponder_scale.settings import from_dict
from ponder_scale.train.schedules import pondering_steps


class Work:
    """Counts the same on every rank.

    Args:
        shape: of the model.

    Attributes:
        steps, sequences, tokens: that went through forward and backward; tokens are predicted ones.
        skipped_steps, skipped_tokens: of them, those whose update was skipped, so that no weight has learned of them.
        flops: of the mathematics; `hardware_flops` counts what is computed twice, too.
        by_pondering_steps: steps by the number of pondering steps that they took.
    """

    def __init__(self, config: RunConfig, shape: Shape) -> None:
        self._seq_len, self._recompute, self._shape = config.data.seq_len, config.train.recompute, shape
        self.steps = self.skipped_steps = self.sequences = self.tokens = self.skipped_tokens = 0
        self.flops = self.hardware_flops = 0.0
        self.by_pondering_steps: Counter[int] = Counter()

    def add(self, sequences: int, pondering_steps: int, *, updated: bool) -> None:
        """Count a step over so many sequences of all ranks; `updated`: it changed the weights."""
        tokens = sequences * self._seq_len
        flops = step_flops(self._shape, self._recompute, pondering_steps, tokens)
        self.steps, self.sequences, self.tokens = self.steps + 1, self.sequences + sequences, self.tokens + tokens
        self.flops, self.hardware_flops = self.flops + flops.model, self.hardware_flops + flops.hardware
        self.by_pondering_steps[pondering_steps] += 1
        if not updated:
            self.skipped_steps, self.skipped_tokens = self.skipped_steps + 1, self.skipped_tokens + tokens

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {
            "steps": self.steps,
            "skipped_steps": self.skipped_steps,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "skipped_tokens": self.skipped_tokens,
            "flops": self.flops,
            "hardware_flops": self.hardware_flops,
            "steps_by_pondering_steps": {str(steps): n for steps, n in sorted(self.by_pondering_steps.items())},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.steps, self.skipped_steps = state["steps"], state["skipped_steps"]
        self.sequences, self.tokens, self.skipped_tokens = state["sequences"], state["tokens"], state["skipped_tokens"]
        self.flops, self.hardware_flops = state["flops"], state["hardware_flops"]
        self.by_pondering_steps = Counter({int(key): n for key, n in state["steps_by_pondering_steps"].items()})

    def estimate(self, checkpoint: Mapping[str, Any], sequences: int) -> None:
        """Go on from a checkpoint that was saved before runs recorded what they did.

        The sequences are those that its loader had read. Their FLOPs, and the pondering steps of each step, are those
        of the recipe that it was saved with, as if it had been the recipe from the first step on.

        Args:
            checkpoint: its state.json.
        """
        recipe = from_dict(RunConfig, checkpoint["config"])
        for step in range(1, checkpoint["step"] + 1):
            steps = pondering_steps(step, recipe.model.pondering_steps, recipe.train.pondering, recipe.seed)
            self.add(recipe.train.batch_at(step), steps, updated=True)
        share = sequences / self.sequences
        self.sequences, self.tokens = sequences, sequences * self._seq_len
        self.flops, self.hardware_flops = self.flops * share, self.hardware_flops * share
        self.skipped_steps = checkpoint["health"]["skips"]
        self.skipped_tokens = math.floor(self.tokens * self.skipped_steps / self.steps)
