"""`python -m benchmarks comm` counts what ZeRO-3 sends in a micro-step of S + 1 passes, by regime and policy.

Two ranks on this machine train a small model under the real engine. They do so once for each regime (a file in
deepspeed_configs/) and recomputation policy. The third micro-step is counted, because DeepSpeed has then recorded its
trace. The counts depend on the model's layers and on S, but not on the device or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.two_ranks import RANKS, on_two_ranks
from benchmarks.workload import POLICIES
from ponder_scale.config import RunConfig

REGIMES = ("zero3_keep_gathered", "zero3_bounded")
MICRO_STEPS = 3
SHAPE = [
    "run_dir=unused",
    "data.sources.any.path=unused",
    "model.vocab_size=4096",
    "model.hidden_size=384",  # large enough that ZeRO-3 does not keep the matrices gathered
    "model.intermediate_size=1032",
    "model.num_hidden_layers=6",
    "model.num_attention_heads=6",
    "data.seq_len=16",
    "train.steps=100",
    f"train.global_batch={RANKS}",
    "train.precision=fp32",
]


@dataclass
class Traffic:
    """Traffic of one micro-step on one rank. Volumes are multiples of the model's weights."""

    forward_gathers: int = 0
    forward_volume: float = 0.0
    backward_gathers: int = 0
    backward_volume: float = 0.0
    reductions: int = 0
    live: float = 0.0  # largest share of the weights that was gathered at the same time


def run(
    *,
    regimes: Sequence[str] | None = None,
    policies: Sequence[str] | None = None,
    pondering_steps: int = 3,
    overrides: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Count, print the table, and return its rows."""
    rows = []
    print(f"ZeRO-3, {RANKS} ranks, S = {pondering_steps}, one micro-step; volumes in multiples of the weights' bytes")
    print(f"{'regime':22s}{'policy':12s}{'forward':>16s}{'backward':>16s}{'reductions':>12s}{'gathered at most':>18s}")
    for regime in regimes or REGIMES:
        for policy in policies or POLICIES:
            chosen = [f"train.deepspeed={regime}", f"train.recompute={policy}"]
            found = traffic([*SHAPE, f"model.pondering_steps={pondering_steps}", *chosen, *overrides])
            rows.append({"regime": regime, "policy": policy, **asdict(found)})
            print(
                f"{regime:22s}{policy:12s}{found.forward_gathers:7d} {found.forward_volume:7.2f}x"
                f"{found.backward_gathers:7d} {found.backward_volume:7.2f}x{found.reductions:12d}{found.live:18.2f}"
            )
    return rows


def traffic(overrides: Sequence[str]) -> Traffic:
    """Measure one micro-step of this run on two ranks."""
    found: Traffic = on_two_ranks(_last_micro_step, overrides)
    return found


def _last_micro_step(engine: Any, config: RunConfig) -> Traffic:
    from ponder_scale.data.sequences import MicroBatch

    tokens = torch.arange(config.data.seq_len + 1).unsqueeze(0) % (config.model.vocab_size or 0)
    for _ in range(MICRO_STEPS):
        with counted(engine) as seen:
            engine.micro_step(MicroBatch(tokens, tokens[:, 1:], None))
        engine.update()
    return seen


@contextmanager
def counted(engine: Any) -> Iterator[Traffic]:
    """Count the traffic of the block on this rank."""
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    seen = Traffic()
    parameters = list(engine.module.parameters())
    everything = sum(parameter.ds_numel for parameter in parameters)
    gathers = ("all_gather_into_tensor", "all_gather", "all_gather_coalesced")
    reductions = ("reduce_scatter_tensor", "all_reduce", "reduce")
    originals = {name: getattr(TorchBackend, name) for name in (*gathers, *reductions)}
    fetch = PartitionedParameterCoordinator.fetch_sub_module

    def gather(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            output = arguments[1] if len(arguments) > 1 else next(iter(options.values()))
            elements = sum(tensor.numel() for tensor in (output if isinstance(output, list) else [output]))
            if torch._C._current_graph_task_id() == -1:
                seen.forward_gathers += 1
                seen.forward_volume += elements / everything
            else:
                seen.backward_gathers += 1
                seen.backward_volume += elements / everything
            return originals[name](*arguments, **options)

        return call

    def reduction(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            seen.reductions += 1
            return originals[name](*arguments, **options)

        return call

    def watched(self: Any, submodule: Any, forward: bool) -> None:
        fetch(self, submodule, forward)
        live = sum(p.ds_numel for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE)
        seen.live = max(seen.live, live / everything)

    for name in gathers:
        setattr(TorchBackend, name, gather(name))
    for name in reductions:
        setattr(TorchBackend, name, reduction(name))
    PartitionedParameterCoordinator.fetch_sub_module = watched
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(TorchBackend, name, original)
        PartitionedParameterCoordinator.fetch_sub_module = fetch
