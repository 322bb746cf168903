"""The rates of a run between logged steps, and its remaining time."""

from __future__ import annotations

import time
from collections import deque
from copy import copy
from typing import Any

from ponder_scale.config import RunConfig
from ponder_scale.train.measure.work import Work

WINDOW = 50  # the remaining time is estimated from these many logged lines, so that one slow or short step is no trend


class Throughput:
    """The rates of training alone. Call `restart` after a save or an evaluation to leave its time out.

    Args:
        work: counts what the run has done. It must have counted a step before `since_last` is called for it.
        peak: dense bf16 FLOP/s of all devices, or None if not known, as on a CPU.
    """

    def __init__(self, config: RunConfig, work: Work, *, peak: float | None) -> None:
        self._config, self._work, self._peak = config, work, peak
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # seconds and tokens
        self._warm = False
        self.restart(0.0)

    def since_last(self, step: int, data_wait: float) -> dict[str, Any]:
        """The rates since the last call or `restart`, for the record of `step`.

        Args:
            data_wait: seconds waited for data since this attempt began.
        """
        work, before, train = self._work, self._before, self._config.train
        seconds = max(time.monotonic() - self._at, 1e-9)
        tokens = work.tokens - before.tokens
        left = (train.sequences_until(train.steps) - train.sequences_until(step)) * self._config.data.seq_len
        waited = data_wait - self._data_wait
        if not self._warm and self._recent:
            self._recent.clear()  # drop the first line of an attempt, whose time includes compiling and connecting
            self._warm = True
        self._recent.append((seconds, tokens))
        pace = sum(spent for spent, _ in self._recent) / sum(trained for _, trained in self._recent)
        self.restart(data_wait)
        return {
            "tokens": work.tokens,
            "global_batch": train.batch_at(step),
            "flops": work.flops,
            "seconds_per_step": seconds / (work.steps - before.steps),
            "seconds_left": pace * left,
            "tokens_per_second": tokens / seconds,
            "mfu": None if self._peak is None else (work.flops - before.flops) / seconds / self._peak,
            "hfu": None if self._peak is None else (work.hardware_flops - before.hardware_flops) / seconds / self._peak,
            "data_wait_share": min(1.0, waited / seconds),
        }

    def restart(self, data_wait: float) -> None:
        """Leave out the time since the last record, because the run did not train. `data_wait` as above."""
        self._before, self._at, self._data_wait = copy(self._work), time.monotonic(), data_wait
