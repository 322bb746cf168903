"""Profile some steps with torch's profiler: write traces, and measure the share of a step spent in collectives."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ponder_scale.config import LogConfig

logger = logging.getLogger(__name__)

# Most events in the memory snapshot of a profiled step. If there are more, the oldest allocations are left out.
SNAPSHOT_EVENTS = 200_000
COLLECTIVES = ("nccl", "gloo:", "mpi:", "rccl")  # parts of the names of their kernels, or of their works on a CPU


class Profiler:
    """Profiles the steps and ranks that the settings name, and writes to RUN/profile.

    Args:
        first_step: first step of this attempt. Steps before it are not profiled again.
    """

    def __init__(self, log: LogConfig, run_dir: Path, *, rank: int, first_step: int) -> None:
        self._log, self._folder, self._rank = log, run_dir / "profile", rank
        self._steps = range(0)
        if log.profile_steps and rank in log.profile_ranks:
            first, last = log.profile_steps
            self._steps = range(max(first, first_step), last + 1)
        self._profile: Any = None

    @contextmanager
    def step(self, step: int, *, logged: bool) -> Iterator[Communication]:
        """Context of a whole step. Yields an object that has its share of communication afterwards."""
        found = Communication()
        if step in self._steps:
            if self._profile is None:
                self._begin()
            yield found
            if step == self._steps[-1]:
                self._end()
        elif logged and self._log.communication:
            with profile(activities=_activities()) as recorded, torch.profiler.record_function("step"):
                yield found
                _synchronize()
            found.share = communication_share(recorded.events())
        else:
            yield found

    def close(self) -> None:
        """Write the profile of steps that the run did not finish."""
        if self._profile is not None:
            self._end()

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=SNAPSHOT_EVENTS)
        self._profile = profile(activities=_activities(), record_shapes=True, profile_memory=True)
        self._profile.start()

    def _end(self) -> None:
        _synchronize()
        self._profile.stop()
        name = f"rank-{self._rank:05d}-steps-{self._steps[0]}-{self._steps[-1]}"
        self._profile.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
        self._profile = None
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("profiled steps %d to %d into %s", self._steps[0], self._steps[-1], self._folder)


class Communication:
    """The share of a step's time that this rank spent in collectives, including the wait for other ranks.

    None if it was not measured.
    """

    share: float | None = None


def communication_share(events: Iterable[Any]) -> float | None:
    """The share of the span of `step` that collectives cover. Overlaps count once. None if the span is not found.

    On a GPU these are the kernels on the device, beside which computation may run. On a CPU they are the works of gloo.
    """
    spans, begin, end = [], None, None
    for event in events:
        name, time = event.name, event.time_range
        if name == "step" and event.device_type == torch.autograd.DeviceType.CPU:
            begin, end = time.start, time.end
        elif any(mark in name.lower() for mark in COLLECTIVES) and not name.lower().startswith("record_param"):
            on_device = event.device_type != torch.autograd.DeviceType.CPU
            if on_device or not torch.cuda.is_available():
                spans.append((time.start, time.end))
    if begin is None or end is None or end <= begin:
        return None
    covered, until = 0.0, begin
    for first, last in sorted(spans):
        first, last = max(first, until), min(last, end)
        if last > first:
            covered, until = covered + last - first, last
    return covered / (end - begin)


def _activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
