"""The contents of a checkpoint: how a save collects them, and which of them may change before a resume."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ponder_scale.checkpoint.parts import WEIGHT
from ponder_scale.checkpoint.save import Part
from ponder_scale.config import RunConfig
from ponder_scale.data.loader import Loader
from ponder_scale.settings import to_dict
from ponder_scale.train.measure.work import Work
from ponder_scale.train.survive.health import Health
from ponder_scale.train.versions import code_commit, versions
from ponder_scale.train.zero.engine import Engine


@dataclass(frozen=True)
class Contents:
    """The parts of a run that its checkpoints save."""

    config: RunConfig
    model_values: dict[str, Any]  # the transformers configuration after a round trip through JSON
    engine: Engine
    loader: Loader
    health: Health
    work: Work

    def part(self, *, copy: bool) -> Part:
        """The tensors that this rank saves. With `copy`, training may change the originals while they are written."""
        partition = self.engine.partition
        return Part(partition.tensors(copy=copy), {"begins": partition.begins()})

    def part_at_full_size(self) -> Part:
        """`part` at the size of a real save: before the first update, weights stand in for the optimizer's moments."""
        tensors, metadata = self.part(copy=False)
        weights = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{WEIGHT}/")}
        if len(weights) < len(tensors):
            return Part(tensors, metadata)
        moments: dict[str, Tensor] = {
            f"moment {number}/{name}": tensor for number in (1, 2) for name, tensor in weights.items()
        }
        return Part({**tensors, **moments}, metadata)

    def state(self, step: int, attempt: int) -> dict[str, Any]:
        """The contents of state.json. Learning rate and pondering steps are left out, as step and seed give them."""
        engine = self.engine
        return {
            "step": step,
            "tokens": self.work.tokens,
            "done": self.work.state(),
            "attempt": attempt,
            "loader": self.loader.state(),
            "health": self.health.state(),
            "optimizer": {"name": engine.optimizer_name, "scalars": engine.partition.scalars()},
            "model": self.model_values,
            "parameters": engine.partition.shapes(),
            "average": None if engine.average_since is None else {"first_step": engine.average_since},
            "zero_stage": engine.zero_stage,
            **self.circumstances(),
        }

    def circumstances(self) -> dict[str, Any]:
        """The settings and surroundings that may change before a resume. The resume then reports the changes."""
        return {
            "config": to_dict(self.config),
            "sharding": self.engine.sharding,
            "world_size": self.engine.world_size,
            "versions": versions(),
            "commit": code_commit(),
        }
