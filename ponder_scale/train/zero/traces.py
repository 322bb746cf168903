"""Keep one recorded ZeRO-3 trace for each number of pondering steps.

ZeRO-3 records the order in which modules run, and uses this trace to prefetch and release weights. When the number of
passes changes, so does the order. ZeRO-3 then drops the trace, and for two micro-steps it gathers every weight only
when it is used. With a random number of pondering steps this would happen at nearly every step. Here each number keeps
its own trace. DeepSpeed's coordinator has no interface for this, so its private fields are exchanged.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, ZeRoTraceMode

_PRIVATE = "_PartitionedParameterCoordinator__"


class TraceBank:
    """Puts the right trace into a ZeRO-3 coordinator before each forward."""

    def __init__(self, engine: Any) -> None:
        self._coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        # DeepSpeed caches what to release after which module, by position in the trace, and never clears this cache.
        release = getattr(PartitionedParameterCoordinator, _PRIVATE + "params_to_release")
        (self._cached_releases,) = (
            cell.cell_contents for cell in release.__closure__ if hasattr(cell.cell_contents, "cache_clear")
        )
        self._known: dict[Hashable, tuple[Any, Any]] = {}
        self._current: Hashable | None = None

    def use(self, key: Hashable) -> None:
        """Use the trace of `key`, or record one. Call it before the forward of each micro-step."""
        coordinator = self._coordinator
        coordinator.reset_step()  # completes the trace that the last micro-step recorded
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
