"""Tokens, FLOPs and time of a run: totals by step, and rates between logged steps."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

from ponder_scale.config import RunConfig
from ponder_scale.cost import Flops, Shape, step_flops
from ponder_scale.train.schedules import pondering_steps

WINDOW = 50  # logged lines by which the time left is told: a slow moment, or a step of few passes, is no trend


class Throughput:
    """Rates of training alone: time for saves and evaluations is left out by `restart`.

    Args:
        peak: dense bf16 FLOP/s of all devices; None where it is not known, as on a CPU.
        start_step: steps done before.
    """

    def __init__(self, config: RunConfig, shape: Shape, *, start_step: int, peak: float | None) -> None:
        self._config, self._shape, self._peak = config, shape, peak
        self._step, self._at, self._data_wait = start_step, time.monotonic(), 0.0
        self._counted, self._flops = 0, 0.0
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # seconds and tokens
        self._warm = False
        self._totals(start_step)

    def since_last(self, step: int, data_wait: float) -> dict[str, Any]:
        """What is recorded of the time since the last call or `restart`, which were after an earlier step.

        Args:
            data_wait: seconds waited for data in all, of this attempt.
        """
        now, (model, hardware) = time.monotonic(), self._totals(step)
        seconds = max(now - self._at, 1e-9)
        steps, tokens = step - self._step, self._tokens(step) - self._tokens(self._step)
        waited, self._data_wait = data_wait - self._data_wait, data_wait
        self._step, self._at = step, now
        if not self._warm and self._recent:
            self._recent.clear()  # the first line of an attempt, which has compiled and connected
            self._warm = True
        self._recent.append((seconds, tokens))
        pace = sum(spent for spent, _ in self._recent) / sum(trained for _, trained in self._recent)
        return {
            "tokens": self._tokens(step),
            "global_batch": self._config.train.batch_at(step),
            "flops": self._flops,
            "seconds_per_step": seconds / steps,
            "seconds_left": pace * (self._tokens(self._config.train.steps) - self._tokens(step)),
            "tokens_per_second": tokens / seconds,
            "mfu": None if self._peak is None else model / seconds / self._peak,
            "hfu": None if self._peak is None else hardware / seconds / self._peak,
            "data_wait_share": min(1.0, waited / seconds),
        }

    def restart(self, step: int, data_wait: float) -> None:
        """Leave out the time since the last record, after something else than training; `data_wait` as above."""
        self._totals(step)
        self._step, self._at, self._data_wait = step, time.monotonic(), data_wait

    def _tokens(self, step: int) -> int:
        """Those of the steps up to `step`."""
        return self._config.train.sequences_until(step) * self._config.data.seq_len

    def _totals(self, step: int) -> tuple[float, float]:
        """Count the FLOPs up to `step`; those of the mathematics and of the hardware since the last count."""
        config = self._config
        tokens: Counter[int] = Counter()  # by pondering steps
        for number in range(self._counted + 1, step + 1):
            steps = pondering_steps(number, config.model.pondering_steps, config.train.pondering, config.seed)
            tokens[steps] += config.train.batch_at(number) * config.data.seq_len
        model = hardware = 0.0
        for steps, count in tokens.items():
            each: Flops = step_flops(self._shape, config.train.recompute, steps, count)
            model, hardware = model + each.model, hardware + each.hardware
        self._counted, self._flops = step, self._flops + model
        return model, hardware
