"""`auto`: choose settings before a run starts, so that it trains in the least time.

You may leave each of `train.recompute`, `train.micro_batch` and `train.deepspeed` to the planner. They are chosen
together, because each takes memory that another could use. For example, a larger micro-batch may leave no room for
weights to stay gathered, and may have to recompute what a smaller one would keep. Of all choices that fit, the planner
takes the one with the least time (see `time`).

The operations of a micro-batch are traced for two sizes, which give them for every size. Its memory is estimated from
the same two traces, and traced again for the chosen size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ponder_scale.config import RunConfig, TrainConfig
from ponder_scale.errors import ConfigError
from ponder_scale.figures import span
from ponder_scale.planning.activations import Traced, micro_batch
from ponder_scale.planning.cost import GIB, RECOMPUTED_FORWARDS
from ponder_scale.planning.plan import Devices, Plan, plan_run, settle_sharding
from ponder_scale.setup.recompute import attention_dropout
from ponder_scale.setup.speed import FLASH

POLICIES = tuple(RECOMPUTED_FORWARDS)
NO_DIFFERENCE = 0.01  # choices within this share of the least time count as equal, and the least memory decides
logger = logging.getLogger(__name__)


def is_auto(train: TrainConfig) -> bool:
    """Whether the planner has to choose anything."""
    return "auto" in (train.recompute, train.micro_batch, train.deepspeed)


def as_before(config: RunConfig, before: TrainConfig | None, ranks: int) -> RunConfig:
    """The run with the choices of its earlier attempt, so that a resumed run computes like the interrupted one.

    A micro-batch that does not divide over the present ranks is chosen again.
    """
    if before is None or is_auto(before):
        return config
    train = config.train
    if train.recompute == "auto":
        train = replace(train, recompute=before.recompute)
    if train.deepspeed == "auto":
        train = replace(train, deepspeed=before.deepspeed)
    if train.micro_batch == "auto" and train.batch_unit % (before.micro_batch_sequences * ranks) == 0:
        train = replace(train, micro_batch=before.micro_batch)
    return replace(config, train=train)


@dataclass(frozen=True)
class Choice:
    """A run without any `auto`, and its plan."""

    config: RunConfig
    plan: Plan

    @property
    def sentence(self) -> str:
        """The choice in words."""
        train, plan = self.config.train, self.plan
        regime = (
            "" if plan.gathers is None else (", weights kept" if plan.gathers.volume == 1 else ", weights released")
        )
        return (
            f"recompute {train.recompute}, micro-batch {train.micro_batch}, {train.deepspeed}{regime}: "
            f"{plan.memory_bytes / GIB:.3g} GiB, {span(plan.step.seconds)} a step ({plan.step.sentence})"
        )


def settle(
    config: RunConfig, shardings: Mapping[str, dict[str, Any]], configuration: Any, devices: Devices
) -> tuple[RunConfig, list[str]]:
    """Replace every `auto` of a run. Returns the run, and lines about the choice and the runner-up.

    Args:
        shardings: the files to choose from, by name. There is only one unless `train.deepspeed` is auto.

    Raises:
        ConfigError: nothing fits.
    """
    if not is_auto(config.train):
        return config, []
    choices = ranked(config, shardings, configuration, devices)
    if not choices:
        raise ConfigError(
            f"train.recompute is {config.train.recompute} and train.micro_batch {config.train.micro_batch}, but "
            f"nothing fits {devices.memory_bytes / GIB:.3g} GiB a rank; shard more with train.deepspeed, or use more "
            "ranks"
        )
    said = [f"chosen         {choices[0].sentence}"]
    if len(choices) > 1:
        said.append(f"runner-up      {choices[1].sentence}")
    return choices[0].config, said


def largest_that_fits(
    config: RunConfig, sharding: dict[str, Any], configuration: Any, devices: Devices
) -> RunConfig | None:
    """The run under this sharding, with every `auto` replaced by the choice of least time. None if nothing fits."""
    choices = ranked(config, {config.train.deepspeed: sharding}, configuration, devices)
    return choices[0].config if choices else None


def ranked(
    config: RunConfig, shardings: Mapping[str, dict[str, Any]], configuration: Any, devices: Devices
) -> list[Choice]:
    """All choices that fit. The first takes the least memory of those within `NO_DIFFERENCE` of the least time."""
    search = _Search(config, shardings, configuration, devices)
    found = sorted(search.candidates(), key=lambda choice: choice.plan.step.seconds)
    while found:
        least = found[0].plan.step.seconds * (1 + NO_DIFFERENCE)
        tied = [choice for choice in found if choice.plan.step.seconds <= least]
        best = min(tied, key=lambda choice: choice.plan.memory_bytes)
        found.remove(best)
        exact = search.traced(best)
        if exact.plan.fits(devices.memory_bytes):
            return [exact, *found]
    return []


@dataclass(frozen=True)
class _Search:
    """The search over policies, micro-batches and shardings."""

    config: RunConfig
    shardings: Mapping[str, dict[str, Any]]
    configuration: Any
    devices: Devices

    @property
    def policies(self) -> tuple[str, ...]:
        """The policies to try."""
        chosen = self.config.train.recompute
        if chosen != "auto":
            return (chosen,)
        policies = POLICIES[1:] if self.config.train.offload_activations else POLICIES
        train = self.config.train  # with these `selective` is refused: see setup
        refused = train.compile or train.attention == FLASH or attention_dropout(self.configuration)[1] > 0
        return tuple(policy for policy in policies if policy != "selective" or not refused)

    @cached_property
    def sizes(self) -> list[int]:
        """The micro-batches that divide the batch of every step over the ranks, in ascending order."""
        if self.config.train.micro_batch != "auto":
            return [self.config.train.micro_batch]
        share = self.config.train.batch_unit // self.devices.ranks
        return [size for size in range(1, share + 1) if share % size == 0]

    def candidates(self) -> Iterator[Choice]:
        """All choices that fit by the estimate of their memory."""
        for policy in self.policies:
            first: dict[int, Traced] = {}
            for size in self.sizes:
                fits = False
                for name, sharding in self.shardings.items():
                    choice = self._choice(policy, size, name, sharding, self._estimate(policy, size, first))
                    if choice.plan.fits(self.devices.memory_bytes):
                        fits = True
                        yield choice
                if not fits:
                    break  # a larger micro-batch needs more memory

    def traced(self, choice: Choice) -> Choice:
        """The same choice, with the memory traced for its own size."""
        train = choice.config.train
        sharding = self.shardings[train.deepspeed]
        return self._choice(str(train.recompute), train.micro_batch_sequences, train.deepspeed, sharding, None)

    def _estimate(self, policy: str, size: int, traced: dict[int, Traced]) -> Traced:
        """The trace of a micro-batch of `size` sequences. Sizes 1 and 2 are traced, and give all others."""
        if size not in traced and (size <= 2 or len(self.sizes) == 1):
            traced[size] = micro_batch(self._run(policy, size, self.config.train.deepspeed), self.configuration)
        if size in traced:
            return traced[size]
        one, two = (self._estimate(policy, number, traced) for number in (1, 2))
        return one.towards(two, size - 1, one.operations.scaled(two.operations, size - 1))

    def _run(self, policy: Any, size: int, name: str) -> RunConfig:
        train = replace(self.config.train, recompute=policy, micro_batch=size, deepspeed=name)
        return replace(self.config, train=train)

    def _choice(self, policy: str, size: int, name: str, sharding: dict[str, Any], estimate: Traced | None) -> Choice:
        config = self._run(policy, size, name)
        settled = settle_sharding(config, sharding, self.configuration, self.devices, traced=estimate)
        return Choice(config, plan_run(config, settled, self.configuration, self.devices, traced=estimate))
