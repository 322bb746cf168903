"""`ponder-scale bench decode`: one more token of a text, from the caches of S + 1 passes against the whole prefix anew.

The published code keeps no key-value cache, so it runs all passes over the whole prefix for each token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ponder_scale.bench import published
from ponder_scale.bench.measure import check_numbers, device_name, medians
from ponder_scale.bench.workload import PUBLISHED, Workload

TOKENS = 4  # decoded in a measured run of the cached ways


def run(work: Workload, *, contexts: list[int], runs: int = 5, threads: int = 1) -> list[dict[str, Any]]:
    """Measure, print the table, and return its rows: seconds a token by context length.

    Raises:
        RuntimeError: the ways do not give the same logits.
    """
    check_numbers(runs=runs, threads=threads, context=min(contexts))
    torch.set_num_threads(threads)
    work = replace(work, batch=1, seq_len=max(contexts) + TOKENS * (runs + 2))
    model = work.build().eval()
    rows = [_measure(model, work, context, runs) for context in contexts]
    print(
        f"decoding, S = {work.model.pondering_steps}: {work.line()}; {device_name(work.device, threads)}; medians of "
        f"{runs} interleaved runs"
    )
    print(f"{'context':>8s} {'whole prefix ms':>16s} {'cached ms':>10s} {'times faster':>13s} {'S = 0 cached':>13s} "
          f"{'logits differ by':>17s}")  # fmt: skip
    for row in rows:
        print(
            f"{row['context']:8d} {1e3 * row[PUBLISHED]:16.1f} {1e3 * row['cached']:10.1f} "
            f"{row[PUBLISHED] / row['cached']:13.1f} {1e3 * row['vanilla']:13.1f} {row['difference']:17.1e}"
        )
    return rows


def _measure(model: Any, work: Workload, context: int, runs: int) -> dict[str, Any]:
    steps = work.model.pondering_steps
    text = work.sequences()
    pondering, vanilla = _Decoding(model, text, context, steps), _Decoding(model, text, context, 0)
    whole = published.next_logits(model, text[:, :context], steps)
    difference = ((pondering.first - whole).abs().max() / whole.abs().max()).item()
    if difference > (1e-4 if work.dtype == "float32" else 5e-2):
        raise RuntimeError(f"at context {context} cached and uncached logits differ by {difference:.1e}")

    def whole_prefix() -> None:
        published.next_logits(model, text[:, :context], steps)

    variants = {PUBLISHED: whole_prefix, "cached": pondering.some, "vanilla": vanilla.some}
    times = medians(variants, runs, work.device)
    seconds = {name: found.seconds / (1 if name == PUBLISHED else TOKENS) for name, found in times.items()}
    return {"context": context, "difference": difference, **seconds}


class _Decoding:
    """A text whose caches are filled up to `context` - 1 tokens, decoded from there."""

    @torch.no_grad()
    def __init__(self, model: Any, text: Tensor, context: int, pondering_steps: int) -> None:
        self._model, self._text, self._steps = model, text, pondering_steps
        self._cache, self._position = DynamicCache(), context - 1
        if context > 1:
            self._forward(text[:, : context - 1])
        self.first = self._next()

    def some(self) -> None:
        """Decode TOKENS tokens."""
        for _ in range(TOKENS):
            self._next()

    @torch.no_grad()
    def _next(self) -> Tensor:
        logits = self._forward(self._text[:, self._position : self._position + 1])
        self._position += 1
        return logits

    def _forward(self, tokens: Tensor) -> Tensor:
        output = self._model(
            input_ids=tokens,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            pondering_steps=self._steps,
        )
        return output.logits[:, -1]
