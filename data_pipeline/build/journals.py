"""What the units of a build have left, read back: where the caps of sources lie, and the results in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from data_pipeline.build.caps import Cut, find_cut, is_behind, room_of
from data_pipeline.build.parallel import Stage
from data_pipeline.config import BuildConfig
from data_pipeline.read.units import Plan


class Journals:
    """The journals of all stages of a build. What needs all units is asked when they are done."""

    def __init__(self, plan: Plan, config: BuildConfig, stage: Callable[[str], Stage]) -> None:
        self._plan, self._config, self._stage = plan, config, stage
        self._taken: dict[int, dict[str, Any]] = {}  # by units that are done
        self._ends: dict[str, int] = {}  # the first unit that is known to lie behind the cap of a source

    @cached_property
    def read(self) -> Stage:
        """The stage that reads the units."""
        return self._stage("scatter" if self._config.shuffle else "shards")

    def units_of(self, source: str) -> list[int]:
        """The numbers of the units of a source."""
        return self._units.get(source, [])

    def is_behind(self, number: int, source: str) -> bool:
        """Whether a unit is not worth reading, since those before it that are done have reached the cap."""
        config = self._config.sources[source]
        if room_of(config) is None:
            return False
        if number < self._ends.get(source, len(self._plan)):
            for i in self.read.done() - set(self._taken):
                result = self.read.result(i)
                self._taken[i] = {key: result[key] for key in ("documents", "tokens", "full")}
            before = [self._taken[i] for i in self.units_of(source) if i < number and i in self._taken]
            if not is_behind(config, before):
                return False
            self._ends[source] = number
        return True

    @cached_property
    def cuts(self) -> dict[str, Cut]:
        """Where the caps of sources lie, by source."""
        found = {}
        for name, source in self._config.sources.items():
            cut = find_cut(source, ((i, self.read.result(i)) for i in self.units_of(name)))
            if cut is not None:
                found[name] = cut
        return found

    @cached_property
    def cut_units(self) -> list[tuple[int, Cut]]:
        """The units that are taken in part."""
        return [(cut.unit, cut) for cut in self.cuts.values() if cut.unit is not None]

    @cached_property
    def behind(self) -> set[int]:
        """The units that are left out."""
        return {unit for cut in self.cuts.values() for unit in cut.behind}

    def results(self) -> Iterator[dict[str, Any]]:
        """What was read, of all units that are taken, in order."""
        again = {number: task for task, (number, _) in enumerate(self.cut_units)}
        cut = self._stage("cut") if again else self.read
        for number in range(len(self._plan)):
            if number not in self.behind:
                yield cut.result(again[number]) if number in again else self.read.result(number)

    def made(self) -> Iterator[dict[str, Any]]:
        """What was written as shards, in order."""
        if not self._config.shuffle:
            return self.results()
        gather = self._stage("gather")
        return map(gather.result, range(len(gather.sizes)))

    @cached_property
    def _units(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number in range(len(self._plan)):
            found.setdefault(self._plan.unit(number).source, []).append(number)
        return found
