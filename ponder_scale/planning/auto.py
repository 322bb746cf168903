"""`train.recompute: auto` and `train.micro_batch: auto`: what the planner finds to fit, before a run starts.

The order is that of time: recomputing nothing is fastest, `pass+layer` slowest. A micro-batch of fewer than
`ENOUGH_TOKENS` leaves a GPU idle between kernels, which costs more than recomputation; so the first policy is taken
that holds so many, or the whole share of a rank, and with it the largest micro-batch that fits and divides the batch
of every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ponder_scale.config import RunConfig, TrainConfig
from ponder_scale.errors import ConfigError
from ponder_scale.planning.cost import GIB, RECOMPUTED_FORWARDS
from ponder_scale.planning.plan import Devices, plan_run, settle_sharding
from ponder_scale.setup.recompute import attention_dropout

BY_TIME = tuple(RECOMPUTED_FORWARDS)
ENOUGH_TOKENS = 8192


def is_auto(train: TrainConfig) -> bool:
    """Whether anything is left to the planner."""
    return "auto" in (train.recompute, train.micro_batch)


def as_before(config: RunConfig, before: TrainConfig | None, ranks: int) -> RunConfig:
    """The run with what an earlier attempt of it settled, so that a resumed run computes as the interrupted one.

    A micro-batch that does not divide over these ranks is settled anew.
    """
    if before is None or is_auto(before):
        return config
    train = config.train
    if train.recompute == "auto":
        train = replace(train, recompute=before.recompute)
    if train.micro_batch == "auto" and train.batch_unit % (before.micro_batch_sequences * ranks) == 0:
        train = replace(train, micro_batch=before.micro_batch)
    return replace(config, train=train)


def settle(config: RunConfig, sharding: dict[str, Any], configuration: Any, devices: Devices) -> RunConfig:
    """The run with numbers and names in place of `auto`.

    Raises:
        ConfigError: nothing fits.
    """
    if not is_auto(config.train):
        return config
    search = _Search(config, sharding, configuration, devices)
    best = None
    for policy in search.policies:
        found = search.largest(policy)
        if found is None:
            continue
        if best is None or found > best[1]:
            best = policy, found
        if found * config.data.seq_len >= ENOUGH_TOKENS or found == search.sizes[-1]:
            break
    if best is None:
        raise ConfigError(
            f"train.recompute is {config.train.recompute} and train.micro_batch {config.train.micro_batch}: nothing "
            f"fits {devices.memory_bytes / GIB:.3g} GiB a rank; shard more by train.deepspeed, or use more ranks"
        )
    return search.run(*best)


@dataclass(frozen=True)
class _Search:
    """Over policies and micro-batches."""

    config: RunConfig
    sharding: dict[str, Any]
    configuration: Any
    devices: Devices

    @property
    def policies(self) -> tuple[str, ...]:
        """Those to be tried, fastest first."""
        chosen = self.config.train.recompute
        if chosen != "auto":
            return (chosen,)
        policies = BY_TIME[1:] if self.config.train.offload_activations else BY_TIME
        masked = attention_dropout(self.configuration)[1] > 0
        return tuple(policy for policy in policies if policy != "selective" or not masked)

    @cached_property
    def sizes(self) -> list[int]:
        """Micro-batches that divide the batch of every step over the ranks, rising."""
        if self.config.train.micro_batch != "auto":
            return [self.config.train.micro_batch]
        share = self.config.train.batch_unit // self.devices.ranks
        return [size for size in range(1, share + 1) if share % size == 0]

    def run(self, policy: Any, size: int) -> RunConfig:
        """The run with these."""
        return replace(self.config, train=replace(self.config.train, recompute=policy, micro_batch=size))

    def largest(self, policy: str) -> int | None:
        """The largest micro-batch that fits under a policy, by bisection: memory grows with it."""
        low, high = 0, len(self.sizes)  # all below `low` fit, none from `high` on
        while low < high:
            middle = (low + high) // 2
            if self._fits(policy, self.sizes[middle]):
                low = middle + 1
            else:
                high = middle
        return self.sizes[low - 1] if low else None

    def _fits(self, policy: str, size: int) -> bool:
        config = self.run(policy, size)
        sharding = settle_sharding(config, self.sharding, self.configuration, self.devices)
        return plan_run(config, sharding, self.configuration, self.devices).fits(self.devices.memory_bytes)
