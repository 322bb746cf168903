"""An unfinished build on disk: its settings, its plan, and the output of finished stages."""

from __future__ import annotations

from collections.abc import Container, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.build.caps import Cut, find_cut, is_behind, room_of
from data_pipeline.build.journals import Journals
from data_pipeline.clean import dedup
from data_pipeline.config import BuildConfig
from data_pipeline.document import Unit
from data_pipeline.read.units import PLAN, Plan
from data_pipeline.tokenize.tokenizer import Tokenizer, tokenizer_of
from data_pipeline.write import shuffle
from data_pipeline.write.output import WORK
from ponder_scale.shards.format import TOKENIZER, dtype_for


class Bucket(NamedTuple):
    """The documents that one task of a shuffle orders."""

    source: str
    number: int  # number within the source
    size: int  # input size in bytes


class Build:
    """What every task of a build needs to know.

    Values that depend on an earlier stage are read on first use, so use them only after that stage is done.
    """

    def __init__(self, folder: Path, config: BuildConfig) -> None:
        self.folder, self.work, self.config = folder, folder / WORK, config
        self.plan = Plan(self.work / PLAN)
        self._taken: dict[int, dict[str, Any]] = {}  # journals of finished units, by number
        self._ends: dict[str, int] = {}  # by source, the first unit known to lie after its cap

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The build's own copy of the tokenizer."""
        return tokenizer_of(self.folder / TOKENIZER, self.config)

    @property
    def engine(self) -> str:
        """The engine that tokenizes, as long as it gives the same tokens as the reference."""
        return str(self.plan.header["engine"])

    @cached_property
    def dtype(self) -> np.dtype:
        """The dtype of tokens on disk."""
        return dtype_for(self.tokenizer.vocab_size)

    def is_masked(self, source: str) -> bool:
        """Whether some tokens of a source do not count in the loss."""
        return self.config.sources[source].loss is not None

    def units_of(self, source: str) -> list[int]:
        return self._units.get(source, [])

    @cached_property
    def _units(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number in range(len(self.plan)):
            found.setdefault(self.plan.unit(number).source, []).append(number)
        return found

    # Output of deduplication

    @cached_property
    def key_runs(self) -> list[int]:
        """The number of sorted runs of keys in each unit."""
        keys = Journals(self.work / "keys")
        return [keys.of(i)["runs"] for i in range(len(self.plan))]

    @cached_property
    def keys(self) -> int:
        """The number of keys of all documents together."""
        keys = Journals(self.work / "keys")
        return sum(keys.of(i)["keys"] for i in range(len(self.plan)))

    @cached_property
    def key_buckets(self) -> int:
        """The number of buckets into which the keys are divided for comparison."""
        return dedup.buckets(self.keys + len(self.seen))

    @cached_property
    def seen(self) -> np.ndarray:
        seen = self.plan.header.get("seen")
        return np.empty(0, dtype=np.uint64) if seen is None else dedup.open_keys(Path(seen))

    def duplicates(self, unit: Unit) -> Container[int]:
        """The numbers of the documents of a unit that are duplicates. Test numbers in ascending order only."""
        if self.config.deduplicate == "none":
            return ()
        return dedup.Duplicates(self.work / "duplicates", self.key_buckets, unit.number)

    # Output of the stage that reads the units

    @cached_property
    def read(self) -> Journals:
        """The journals of the stage that reads the units."""
        return Journals(self.work / ("scatter" if self.config.shuffle else "shards"))

    def is_behind(self, unit: Unit) -> bool:
        """Whether a unit need not be read, because finished units before it have reached the cap."""
        source = self.config.sources[unit.source]
        if room_of(source) is None:
            return False
        if unit.number < self._ends.get(unit.source, len(self.plan)):
            for i in self.read.done() - set(self._taken):
                journal = self.read.of(i)
                self._taken[i] = {key: journal[key] for key in ("documents", "tokens", "full")}
            before = [self._taken[i] for i in self.units_of(unit.source) if i < unit.number and i in self._taken]
            if not is_behind(source, before):
                return False
            self._ends[unit.source] = unit.number
        return True

    @cached_property
    def cuts(self) -> dict[str, Cut]:
        found = {}
        for name, source in self.config.sources.items():
            cut = find_cut(source, ((i, self.read.of(i)) for i in self.units_of(name)))
            if cut is not None:
                found[name] = cut
        return found

    @cached_property
    def cut_units(self) -> list[tuple[int, Cut]]:
        """The units that are taken in part, each with its cap."""
        return [(cut.unit, cut) for cut in self.cuts.values() if cut.unit is not None]

    @cached_property
    def behind(self) -> set[int]:
        """The units that are left out because they lie after a cap."""
        return {unit for cut in self.cuts.values() for unit in cut.behind}

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The buckets of the shuffle."""
        found = []
        for source in self.config.sources:
            sizes = [self.plan.sizes[number] for number in self.units_of(source)]
            count = max(1, -(-sum(sizes) // shuffle.BUCKET_BYTES))
            if self.config.sources[source].streaming:  # a stream has no known size
                count = len(sizes)
            found += [Bucket(source, i, sum(sizes) // count) for i in range(count)]
        return found

    # Output of all stages

    def results(self) -> Iterator[dict[str, Any]]:
        """Yield the journals of reading, for all units that are taken, in order."""
        again = {number: task for task, (number, _) in enumerate(self.cut_units)}
        cut = Journals(self.work / "cut")
        for number in range(len(self.plan)):
            if number not in self.behind:
                yield cut.of(again[number]) if number in again else self.read.of(number)

    def made(self) -> Iterator[dict[str, Any]]:
        """Yield the journals of writing shards, in order."""
        if not self.config.shuffle:
            return self.results()
        return map(Journals(self.work / "gather").of, range(len(self.buckets)))
