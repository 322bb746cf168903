"""`python -m benchmarks decode` compares decoding a token from the caches of S + 1 passes with recomputing the prefix.

The published code keeps no key-value cache, so it runs all passes over the whole prefix for each token.

A token uses each weight once per pass, so memory bandwidth limits its speed. The table gives the share of this limit
that each way reaches: the bytes that it has to read, divided by its time and by the memory bandwidth. The bandwidth is
that of a plain read or copy, too large for the caches, in the same rounds.
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

TOKENS = 4  # tokens that one run of a cached way decodes
WAYS = {PUBLISHED: "whole prefix", "cached": "cached", "compiled": "compiled", "vanilla": "S = 0 cached"}
STREAM_BYTES = 2**29  # larger than any cache


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
    print(
        f"{'context':>8s} {'way':>12s} {'ms a token':>11s} {'times faster':>13s} {'of bandwidth':>13s} "
        f"{'logits differ by':>17s}"
    )
    for row in rows:
        for way in [name for name in WAYS if name in row]:
            difference = f"{row[f'{way} difference']:17.1e}" if f"{way} difference" in row else ""
            share = f"{row[f'{way} share']:13.0%}" if f"{way} share" in row else " " * 13
            times = f"{1e3 * row[way]:11.1f} {row[PUBLISHED] / row[way]:13.1f}"
            print(f"{row['context']:8d} {WAYS[way]:>12s} {times} {share} {difference}".rstrip())
        read = f"{row['bytes'] / 1e6:.0f} MB a token at least"
        print(f"{row['context']:8d} {read}; memory bandwidth {row['bandwidth'] / 1e9:.1f} GB/s")
    return rows


def bytes_of_a_token(model: Any, context: int, pondering_steps: int) -> int:
    """Bytes to read for one token: layers in every pass, both tables in each step, the head, the caches."""
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    tables = {id(weight): weight.nbytes for weight in (head, table)}
    inside = sum(weight.nbytes for layer in model.layers for weight in layer.parameters())
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * context * heads * width * head.element_size() * model.num_layers
    return (pondering_steps + 1) * (inside + cached) + pondering_steps * sum(tables.values()) + head.nbytes


class _Stream:
    """Reads and copies more than the caches hold, to measure the memory bandwidth."""

    def __init__(self, device: str) -> None:
        self._source = torch.ones(STREAM_BYTES // 4, device=device)
        self._target = torch.empty_like(self._source)

    def read(self) -> None:
        """Read STREAM_BYTES."""
        self._source.sum()

    def copy(self) -> None:
        """Read STREAM_BYTES and write as many."""
        self._target.copy_(self._source)


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

    stream = _Stream(work.device)
    variants = {PUBLISHED: whole_prefix, **{name: decoder.some for name, decoder in decoders.items()}}
    times = medians({**variants, "read": stream.read, "copy": stream.copy}, runs, work.device)
    bandwidth = max(STREAM_BYTES / times["read"].seconds, 2 * STREAM_BYTES / times["copy"].seconds)
    row = {"context": context, "bandwidth": bandwidth, "bytes": bytes_of_a_token(model, context, steps), **differences}
    row |= {name: times[name].seconds / (1 if name == PUBLISHED else TOKENS) for name in variants}
    for name in decoders:
        needed = bytes_of_a_token(model, context, 0 if name == "vanilla" else steps)
        row[f"{name} share"] = needed / row[name] / bandwidth
    return row


class _Decoding:
    """A text whose caches hold its first `context` - 1 tokens. Decoding continues from there."""

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
        """The function that decodes one token."""
        return model

    def some(self) -> None:
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
        return output.logits[:, -1].clone()  # a CUDA graph writes the next logits into the same memory


class _Compiled(_Decoding):
    """Decoding with a step that torch compiles. Its caches have room for the whole text from the beginning."""

    def _new_cache(self, model: Any) -> Cache:
        return StaticCache(config=model.config, max_cache_len=self._text.shape[1])

    def _step_of(self, model: Any) -> Any:
        torch._dynamo.reset()  # drop the step for another context, whose caches have another size
        mode = "reduce-overhead" if model.device.type == "cuda" else None  # uses CUDA graphs
        return torch.compile(model.forward, dynamic=False, fullgraph=True, mode=mode)
