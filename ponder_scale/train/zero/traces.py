"""One recorded ZeRO-3 trace per number of pondering steps.

ZeRO-3 records the order in which modules run, and prefetches and releases weights by it. When the number of passes
changes, the order is another one: the trace is thrown away and two micro-steps go by without prefetch, every weight
gathered where it is used. With a random number of pondering steps that is nearly every step. Here each number keeps
its own trace. The coordinator has no interface for it, so its private fields are exchanged.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, ZeRoTraceMode

_PRIVATE = "_PartitionedParameterCoordinator__"


class TraceBank:
    """Exchanges the trace of a ZeRO-3 coordinator before each forward."""

    def __init__(self, engine: Any) -> None:
        self._coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        # what to release after which module is cached by position in the trace, and never forgotten by itself
        release = getattr(PartitionedParameterCoordinator, _PRIVATE + "params_to_release")
        (self._cached_releases,) = (
            cell.cell_contents for cell in release.__closure__ if hasattr(cell.cell_contents, "cache_clear")
        )
        self._known: dict[Hashable, tuple[Any, Any]] = {}
        self._current: Hashable | None = None

    def use(self, key: Hashable) -> None:
        """Go on with the trace of `key`, or record one. Called where forward and backward of a micro-step begin."""
        coordinator = self._coordinator
        coordinator.reset_step()  # completes what the last micro-step recorded
        if self._current is not None and coordinator.is_complete_trace():
            self._known[self._current] = (self._get("submodule_order"), self._get("param_order"))
        if key == self._current and coordinator.is_complete_trace():
            return
        self._cached_releases.cache_clear()
        self._current = key
        if key in self._known:
            modules, parameters = self._known[key]
            self._set("submodule_order", modules)
            self._set("param_order", parameters)
            self._set("trace_mode", ZeRoTraceMode.COMPLETE)
        else:
            coordinator._clear_trace_structures()
            self._set("trace_mode", ZeRoTraceMode.INVALID)

    def _get(self, name: str) -> Any:
        return getattr(self._coordinator, _PRIVATE + name)

    def _set(self, name: str, value: Any) -> None:
        setattr(self._coordinator, _PRIVATE + name, value)
