"""Decide whether a step may change the weights: never if it is not finite, and as the settings say if it is a spike.

The decision uses numbers that all ranks share: the loss summed over the ranks and the norm of the reduced gradient. So
all ranks decide alike without another collective.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ponder_scale.config import HealthConfig
from ponder_scale.errors import UnhealthyError


@dataclass(frozen=True)
class Finding:
    """What is wrong with a step."""

    kind: Literal["not finite", "spike"]
    quantity: Literal["loss", "grad_norm"]
    value: float
    mean: float | None  # of the window; None if the value is not finite
    deviation: float | None
    treatment: Literal["warn", "skip", "rewind"]

    def values(self) -> dict[str, Any]:
        """The fields, for metrics.jsonl."""
        return asdict(self)

    def __str__(self) -> str:
        name = {"loss": "loss", "grad_norm": "gradient norm"}[self.quantity]
        if self.mean is None:
            return f"{name} {self.value}"
        return f"{name} {self.value:.3f}, mean {self.mean:.3f}, standard deviation {self.deviation:.3f}"


class Health:
    """Judges each step. Its state is saved in checkpoints."""

    def __init__(self, config: HealthConfig) -> None:
        self._config = config
        self._windows: dict[str, deque[float]] = {
            name: deque(maxlen=config.spike_window) for name in ("loss", "grad_norm")
        }
        self.skips, self._in_a_row = 0, 0
        self.finding: Finding | None = None  # of the last step

    def accepts(self, loss: float, grad_norm: float, labels: int = 1) -> bool:
        """Whether the step may update the weights. `finding` then has what is wrong with the step, or None.

        A step without `labels` has loss and gradient 0, so it does not enter the windows that judge later steps.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        self.finding = self._not_finite(values) or self._spike(values)
        if self.finding is not None and self.finding.treatment != "warn":
            self.skips, self._in_a_row = self.skips + 1, self._in_a_row + 1
            return False
        self._in_a_row = 0
        for name, value in values.items() if labels else ():
            self._windows[name].append(value)
        return True

    def check(self, step: int) -> None:
        """Raises UnhealthyError after too many steps without an update."""
        if self._in_a_row > self._config.max_skips:
            raise UnhealthyError(
                f"step {step}: {self.finding}; {self._in_a_row} steps in a row were skipped (health.max_skips "
                f"{self._config.max_skips}), so the weights are those before them; look at evidence/ in the run folder"
            )

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        windows = {name: list(window) for name, window in self._windows.items()}
        return {"windows": windows, "skips": self.skips, "skips_in_a_row": self._in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. The window may have another length now."""
        for name, window in self._windows.items():
            window.clear()
            window.extend(state["windows"][name])
        self.skips, self._in_a_row = state["skips"], state["skips_in_a_row"]

    def _not_finite(self, values: Mapping[str, float]) -> Finding | None:
        for name, value in values.items():
            if not math.isfinite(value):
                return Finding("not finite", name, value, None, None, "skip")  # type: ignore[arg-type]
        return None

    def _spike(self, values: Mapping[str, float]) -> Finding | None:
        if self._config.spike_sigma is None:
            return None
        for name, value in values.items():
            window = self._windows[name]
            if len(window) < self._config.spike_window // 2:
                continue
            mean = math.fsum(window) / len(window)
            deviation = math.sqrt(math.fsum((entry - mean) ** 2 for entry in window) / len(window))
            if value > mean + self._config.spike_sigma * deviation:
                return Finding("spike", name, value, mean, deviation, self._config.on_spike)  # type: ignore[arg-type]
        return None
