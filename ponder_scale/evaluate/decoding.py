"""Measure what faster ways to decode save and cost: early exit, fewer steps, self-speculation.

There are two measurements on held-out sequences:

    forced    feeds the text's own tokens one by one after a prompt, so that all ways are compared at the same positions
              with the same prefix; gives the loss and the changed tokens
    free      continues the same prompts greedily; gives the speed, and the acceptance of drafts
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ponder_scale.config import INTERLEAVED, DataConfig, SourceConfig
from ponder_scale.data.loader import heldout_batches, open_sources
from ponder_scale.errors import ConfigError, ShardError
from ponder_scale.evaluate.generate import counted, load_folder
from ponder_scale.evaluate.perplexity import check_tokenizer
from ponder_scale.figures import json_text


@dataclass(frozen=True)
class Way:
    """A way to decode, and its measurements.

    Args:
        loss: mean loss of the held-out tokens after the prompts, in nats. None if it is that of plain decoding.
        changed: share of these tokens whose most probable token is not that of plain decoding.
        passes: passes of the model for each new token of the free continuations.
        draft_passes: passes of the draft for each new token.
        speed: tokens/s of the free continuations, relative to plain decoding.
        accepted: share of the draft's proposals that were accepted.
    """

    name: str
    loss: float
    changed: float
    passes: float
    speed: float
    draft_passes: float = 0.0
    accepted: float | None = None


def measure(
    folder: Path,
    data: Mapping[str, Path],
    *,
    sequences: int = 8,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    exit_kl: Sequence[float] = (0.001, 0.01, 0.1),
    json_file: Path | None = None,
    trust_remote_code: bool = False,
) -> list[Way]:
    """Measure every way to decode with an exported folder on held-out sequences. Prints and returns the results.

    Raises:
        ConfigError: the lengths do not fit the model, or there are several folders of data.
        ShardError, TokenizerError: the shards hold nothing out, or were made with another tokenizer.
    """
    if len(data) > 1:
        raise ConfigError(f"--data names {len(data)} folders; decoding is measured on one, so give one")
    model, _ = load_folder(folder, trust_remote_code=trust_remote_code)
    length, most = prompt_tokens + new_tokens, model.config.max_position_embeddings
    if not (prompt_tokens >= 1 and new_tokens >= 2 and length <= most):
        raise ConfigError(
            f"--prompt-tokens {prompt_tokens} and --new-tokens {new_tokens}: expected at least 1 and 2, and together "
            f"at most {most}, the positions of the model"
        )
    rows = list(_rows(folder, data, sequences, length, model.device))
    bench = _Bench(model, rows, prompt_tokens, new_tokens)
    found = list(_ways(bench, exit_kl))
    print(f"{len(rows)} sequences, {new_tokens} tokens after {prompt_tokens} each, S = {bench.steps}, {model.device}")
    print(as_table(found))
    if json_file is not None:
        json_file.write_text(json_text([asdict(way) for way in found], indent=1) + "\n", encoding="utf-8")
    return found


def as_table(ways: Sequence[Way]) -> str:
    """The table as text, with a line for each way."""
    width = max(len(way.name) for way in ways)
    lines = [f"{'':{width}}    loss  changed  passes/token  draft passes  accepted  speed"]
    for way in ways:
        accepted = "-" if way.accepted is None else f"{way.accepted:.0%}"
        lines.append(
            f"{way.name:{width}}  {way.loss:6.4f}  {way.changed:7.2%}  {way.passes:12.2f}  {way.draft_passes:12.2f}  "
            f"{accepted:>8}  {way.speed:4.2f}x"
        )
    return "\n".join(lines)


def _rows(folder: Path, data: Mapping[str, Path], sequences: int, length: int, device: Any) -> Iterator[Tensor]:
    """Held-out sequences of `length` tokens, (1, length) each."""
    name, shards = next(iter(data.items()))
    config = DataConfig({name: SourceConfig(str(shards))}, length - 1)
    sources = open_sources(config, "--data {}")
    check_tokenizer(sources[name], shards, folder)
    found = False
    for batch in heldout_batches(config, sources, sequences=sequences, micro_batch=1):
        found = True
        yield batch.tokens.to(device)
    if not found:
        raise ShardError(f"{shards}: no held-out sequence of {length} tokens; lower --prompt-tokens or --new-tokens")


def _ways(bench: _Bench, exit_kl: Sequence[float]) -> Iterator[Way]:
    plain = bench.way("plain")
    yield plain
    positions = bench.model.config.feedback in INTERLEAVED  # which have no earlier pass to end at
    for threshold in () if positions else exit_kl:
        yield bench.way(f"early exit at {threshold:g} nats", exit_kl=threshold)
    for steps in range(bench.steps):
        yield bench.way(f"{steps} pondering steps", pondering_steps=steps)
    for steps in range(bench.steps):
        yield bench.drafted(steps, plain)
    if getattr(bench.model.config, "extra_heads", 0):
        yield bench.drafted_by_heads(plain)


class _Bench:
    """Held-out sequences and a model that decodes them. All ways are compared with the first one that is measured."""

    def __init__(self, model: Any, rows: list[Tensor], prompt_tokens: int, new_tokens: int) -> None:
        self.model, self.rows, self.steps = model, rows, model.config.pondering_steps
        self._prompt, self._new = prompt_tokens, new_tokens
        self._best: Tensor | None = None
        self._seconds: float | None = None

    def way(self, name: str, **options: Any) -> Way:
        """Both measurements with these options of the model's forward."""
        loss, best = self._forced(options)
        self._best = best if self._best is None else self._best
        changed = (best != self._best).float().mean().item()
        with counted(self.model) as counts:
            seconds = self._free(options)
        return Way(name, loss, changed, counts.passes / self._generated, self._speed(seconds))

    def drafted(self, steps: int, plain: Way) -> Way:
        """Self-speculation. Its text is that of plain decoding, so only the speed is measured."""
        draft = self.model.draft(steps)
        with counted(self.model) as counts, counted(draft) as drafts:
            seconds = self._free({"assistant_model": draft})
        accepted = (self._generated - counts.forwards) / max(1, drafts.forwards)
        passes = [each.passes / self._generated for each in (counts, drafts)]
        name = f"draft of {steps} pondering steps"
        return Way(name, plain.loss, 0.0, passes[0], self._speed(seconds), passes[1], accepted)

    def drafted_by_heads(self, plain: Way) -> Way:
        """Self-speculation with the extra heads, which take no pass of their own."""
        drafts = self.model.draft_heads()
        with counted(self.model) as counts:
            seconds = self._free({"custom_generate": drafts})
        accepted = drafts.accepted / max(1, drafts.proposed)
        passes, name = counts.passes / self._generated, f"draft of {self.model.config.extra_heads} extra heads"
        return Way(name, plain.loss, 0.0, passes, self._speed(seconds), 0.0, accepted)

    @property
    def _generated(self) -> int:
        return self._new * len(self.rows)

    def _speed(self, seconds: float) -> float:
        self._seconds = seconds if self._seconds is None else self._seconds
        return self._seconds / seconds

    @torch.no_grad()
    def _forced(self, options: dict[str, Any]) -> tuple[float, Tensor]:
        """The mean loss, and the most probable token at each position, (rows * new tokens,)."""
        losses, best = [], []
        for row in self.rows:
            cache = DynamicCache()
            logits = self.model(row[:, : self._prompt], past_key_values=cache, logits_to_keep=1, **options).logits
            for place in range(self._prompt, self._prompt + self._new):
                said = logits[0, -1].float().log_softmax(-1)  # (V,)
                losses.append(-said[row[0, place]])
                best.append(said.argmax())
                if place + 1 < row.shape[1]:
                    logits = self.model(row[:, place : place + 1], past_key_values=cache, **options).logits
        return torch.stack(losses).mean().item(), torch.stack(best)

    def _free(self, options: dict[str, Any]) -> float:
        """The seconds of greedy continuations of all prompts."""
        # End tokens are forbidden, so that all ways make the same number of tokens.
        fixed = {"do_sample": False, "max_new_tokens": self._new, "min_new_tokens": self._new}
        begin = time.monotonic()
        for row in self.rows:
            prompt = row[:, : self._prompt]
            self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **fixed, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic() - begin
