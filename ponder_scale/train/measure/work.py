"""Count what a run has done so far: steps, sequences, tokens, floating-point operations.

The counts are added up step by step and saved in every checkpoint. They are never computed from the recipe, because
you may change the batch, its ramp and the pondering schedule when you resume.
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
    """The counts of a run, which are the same on every rank.

    Args:
        shape: shape of the model.

    Attributes:
        steps, sequences, tokens: those that went through forward and backward. Tokens are predicted tokens.
        skipped_steps, skipped_tokens: those among them whose update was skipped, so no weight has learned from them.
        flops: operations that the mathematics needs. `hardware_flops` also counts operations that are done twice.
        by_pondering_steps: number of steps by the number of pondering steps that they took.
    """

    def __init__(self, config: RunConfig, shape: Shape) -> None:
        self._seq_len, self._recompute, self._shape = config.data.seq_len, config.train.recompute, shape
        self._pass_losses = config.train.pass_losses
        self.steps = self.skipped_steps = self.sequences = self.tokens = self.skipped_tokens = 0
        self.flops = self.hardware_flops = 0.0
        self.by_pondering_steps: Counter[int] = Counter()

    def add(self, sequences: int, pondering_steps: int, refinements: int | None = None, *, updated: bool) -> None:
        """Count a step. `sequences` are those of all ranks, and `updated` says whether it changed the weights."""
        tokens = sequences * self._seq_len
        flops = step_flops(self._shape, self._recompute, pondering_steps, tokens, self._pass_losses, refinements)
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
        """Continue from `state`."""
        self.steps, self.skipped_steps = state["steps"], state["skipped_steps"]
        self.sequences, self.tokens, self.skipped_tokens = state["sequences"], state["tokens"], state["skipped_tokens"]
        self.flops, self.hardware_flops = state["flops"], state["hardware_flops"]
        self.by_pondering_steps = Counter({int(key): n for key, n in state["steps_by_pondering_steps"].items()})

    def estimate(self, checkpoint: Mapping[str, Any], sequences: int) -> None:
        """Continue from a checkpoint that was saved by an old version, which did not record what a run has done.

        The FLOPs and the pondering steps of each step are computed from the recipe in the checkpoint, as if that had
        been the recipe from the first step on.

        Args:
            checkpoint: contents of its state.json.
            sequences: those that its loader had read.
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
