"""`ponder-scale plan RECIPE --gpus 8,64,512`: show how a run's time and cost grow with devices, for each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ponder_scale.config import RunConfig
from ponder_scale.figures import rate, span
from ponder_scale.planning.auto import NO_DIFFERENCE, largest_that_fits
from ponder_scale.planning.plan import Devices, Plan, plan_run, settle_sharding

PAYS = 0.5  # more devices stop paying when each adds less than this share of the speed of the first ones


@dataclass(frozen=True)
class Row:
    """A run under one sharding on some number of devices. `plan` is None if nothing fits."""

    sharding: str
    config: RunConfig
    plan: Plan | None

    @property
    def cost(self) -> float:
        """The device seconds of the run, or inf if nothing fits."""
        return float("inf") if self.plan is None else self.plan.seconds * self.plan.ranks


def scaling(
    config: RunConfig, shardings: Mapping[str, dict[str, Any]], configuration: Any, sizes: Sequence[Devices]
) -> list[list[Row]]:
    """For each number of devices, a row for each sharding.

    A global batch that does not divide over the devices is raised to their next multiple. The run then takes fewer
    steps, for the same number of tokens.
    """
    rows = []
    for devices in sizes:
        fitted = _divided(config, devices.ranks)
        rows.append([_row(fitted, name, sharding, configuration, devices) for name, sharding in shardings.items()])
    return rows


def _divided(config: RunConfig, ranks: int) -> RunConfig:
    train = config.train
    if train.batch_unit % ranks == 0:
        return config
    batch = -(-train.global_batch // ranks) * ranks
    steps = max(1, round(train.sequences_until(train.steps) / batch))
    return replace(
        config,
        train=replace(train, global_batch=batch, steps=steps, batch_ramp_from=None, batch_ramp_steps=None),
    )


def _row(config: RunConfig, name: str, sharding: dict[str, Any], configuration: Any, devices: Devices) -> Row:
    train, ranks = config.train, devices.ranks
    if train.micro_batch != "auto" and train.batch_unit % (train.micro_batch * ranks):
        config = replace(config, train=replace(train, micro_batch="auto"))
    config = replace(config, train=replace(config.train, deepspeed=name))
    found = largest_that_fits(config, sharding, configuration, devices)
    if found is None:
        return Row(name, config, None)
    settled = settle_sharding(found, sharding, configuration, devices)
    return Row(name, found, plan_run(found, settled, configuration, devices))


def scaling_lines(config: RunConfig, rows: Sequence[Sequence[Row]], sizes: Sequence[Devices]) -> list[str]:
    """The lines of the table, and a line for each sharding about where it stops paying."""
    lines = [
        f"{'devices':>8s} {'sharding':14s} {'recompute':11s} {'micro':>5s} {'step':>9s} {'tokens/s':>9s} {'time':>10s} "
        f"{'device hours':>13s} {'communication':>13s}"
    ]
    raised = set()
    for row in (row for group in rows for row in group):
        ranks = next(devices.ranks for devices, group in zip(sizes, rows, strict=True) if row in group)
        train, plan = row.config.train, row.plan
        if plan is None:
            lines.append(f"{ranks:8,d} {row.sharding:14s} does not fit")
            continue
        other = train.global_batch != config.train.global_batch
        raised |= {(ranks, train.global_batch)} if other else set()
        lines.append(
            f"{ranks:8,d} {row.sharding:14s} {train.recompute:11s} {train.micro_batch!s:>5s} "
            f"{span(plan.step.seconds):>9s} "
            f"{rate(plan.tokens / plan.seconds):>9s} {span(plan.seconds):>10s} {plan.seconds * ranks / 3600:13,.1f} "
            f"{plan.step.communication:13.1%}" + (" *" if other else "")
        )
    lines += [
        f"* at train.global_batch={batch}, the least that divides over {ranks:,} devices; the tokens are the same"
        for ranks, batch in sorted(raised)
    ]
    return [*lines, *_ends(rows, sizes)]


def _ends(rows: Sequence[Sequence[Row]], sizes: Sequence[Devices]) -> list[str]:
    """A line for each sharding: the number of devices from which another is cheaper, or more devices hardly help."""
    lines = []
    for index, first in enumerate(rows[0]):
        column = [group[index] for group in rows]
        beaten = next(((d, g) for d, g, own in zip(sizes, rows, column, strict=True) if _beats(_best(g), own)), None)
        slow = next(
            (
                devices
                for before, after, devices in zip(column, column[1:], sizes[1:], strict=False)
                if _idles(before, after)
            ),
            None,
        )
        name, said = first.sharding, []
        if beaten is not None:
            best, own = _best(beaten[1]), beaten[1][index]
            less = "fits where it does not" if own.plan is None else f"takes {1 - best.cost / own.cost:.1%} less time"
            said.append(f"on {beaten[0].ranks:,} devices {best.sharding} {less}")
        if slow is not None:
            said.append(f"up to {slow.ranks:,} each further device adds less than {PAYS:.0%} of one device's speed")
        lines.append(f"{name:14s} " + ("; ".join(said) if said else "pays on all of these"))
    return lines


def _best(group: Sequence[Row]) -> Row:
    return min(group, key=lambda row: row.cost)


def _beats(best: Row, own: Row) -> bool:
    return best.cost * (1 + NO_DIFFERENCE) < own.cost


def _idles(before: Row, after: Row) -> bool:
    """Whether each device that `after` has more adds less than `PAYS` of the speed of a device of `before`."""
    if before.plan is None or after.plan is None:
        return False
    one, two = (row.plan.tokens / row.plan.seconds for row in (before, after) if row.plan is not None)
    more = after.plan.ranks - before.plan.ranks
    return more > 0 and (two - one) / more < PAYS * one / before.plan.ranks
