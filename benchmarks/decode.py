"""`python -m benchmarks decode`: a token of a text from the caches of S + 1 passes, against the whole prefix anew.

The published code keeps no key-value cache, so it runs all passes over the whole prefix for each token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from benchmarks import published
from benchmarks.measure import check_numbers, device_name, medians
from benchmarks.workload import PUBLISHED, Workload

TOKENS = 4  # decoded in a measured run of the cached ways
WAYS = {PUBLISHED: "whole prefix", "cached": "cached", "compiled": "compiled", "vanilla": "S = 0 cached"}


def run(
    work: Workload, *, contexts: list[int], runs: int = 5, threads: int = 1, compiled: bool = False
) -> list[dict[str, Any]]:
    """Measure, print the table, and return its rows: seconds a token by context length.

    compiled: also by a decoding step that torch compiles, with caches of a fixed size.

    Raises:
        RuntimeError: the ways do not give the same logits.
    """
    check_numbers(runs=runs, threads=threads, context=min(contexts))
    torch.set_num_threads(threads)
    work = replace(work, batch=1, seq_len=max(contexts) + TOKENS * (runs + 2))
    model = work.build().eval()
    rows = [_measure(model, work, context, runs, compiled) for context in contexts]
    print(
        f"decoding, S = {work.model.pondering_steps}: {work.line()}; {device_name(work.device, threads)}; medians of "
        f"{runs} interleaved runs"
    )
    print(f"{'context':>8s} {'way':>12s} {'ms a token':>11s} {'times faster':>13s} {'logits differ by':>17s}")
    for row in rows:
        for way in [name for name in WAYS if name in row]:
            difference = f"{row[f'{way} difference']:17.1e}" if f"{way} difference" in row else ""
            faster = row[PUBLISHED] / row[way]
            print(f"{row['context']:8d} {WAYS[way]:>12s} {1e3 * row[way]:11.1f} {faster:13.1f} {difference}".rstrip())
    return rows


def _measure(model: Any, work: Workload, context: int, runs: int, compiled: bool) -> dict[str, Any]:
    steps, text = work.model.pondering_steps, work.sequences()
    decoders = {"cached": _Decoding(model, text, context, steps)}
    if compiled:
        decoders["compiled"] = _Compiled(model, text, context, steps)
    whole = published.next_logits(model, text[:, :context], steps)
    differences = {}
    for name, decoder in decoders.items():
        difference = ((decoder.first - whole).abs().max() / whole.abs().max()).item()
        if difference > (1e-4 if work.dtype == "float32" else 5e-2):
            raise RuntimeError(f"at context {context} {name} and uncached logits differ by {difference:.1e}")
        differences[f"{name} difference"] = difference
    decoders["vanilla"] = _Decoding(model, text, context, 0)

    def whole_prefix() -> None:
        published.next_logits(model, text[:, :context], steps)

    variants = {PUBLISHED: whole_prefix, **{name: decoder.some for name, decoder in decoders.items()}}
    times = medians(variants, runs, work.device)
    seconds = {name: found.seconds / (1 if name == PUBLISHED else TOKENS) for name, found in times.items()}
    return {"context": context, **differences, **seconds}


class _Decoding:
    """A text whose caches are filled up to `context` - 1 tokens, decoded from there."""

    @torch.no_grad()
    def __init__(self, model: Any, text: Tensor, context: int, pondering_steps: int) -> None:
        self._text, self._steps = text, pondering_steps
        self._cache = self._new_cache(model)
        self._call, self._position = model, context - 1
        if context > 1:
            self._forward(text[:, : context - 1])
        self._call = self._step_of(model)
        self.first = self._next()

    def _new_cache(self, model: Any) -> Cache:
        return DynamicCache()

    def _step_of(self, model: Any) -> Any:
        """What runs one token."""
        return model

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
        output = self._call(
            input_ids=tokens,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            pondering_steps=self._steps,
        )
        return output.logits[:, -1]


class _Compiled(_Decoding):
    """The same by a step that torch compiles; its caches have room for the whole text from the beginning."""

    def _new_cache(self, model: Any) -> Cache:
        return StaticCache(config=model.config, max_cache_len=self._text.shape[1])

    def _step_of(self, model: Any) -> Any:
        torch._dynamo.reset()  # of another context, whose caches have another size
        return torch.compile(model.forward, dynamic=False)
