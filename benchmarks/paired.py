"""Paired training for `python -m benchmarks gpu --train`: pondering and vanilla on the same text in the same order.

The text is the source code of Python's standard library, which every machine has. Three models of one shape are
trained: one with S pondering steps, one without on as many tokens, and one without for as long. Each has a single seed,
so the result is a first look and not a finding.
"""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rows import Place, Row
from benchmarks.workload import Training, Workload, workload
from ponder_scale.errors import ConfigError

STEPS = 3
HELD_OUT = 0.02  # share of the text that is held out, at its end
WARM_UP = 0.02  # share of the steps
RATE = 1e-3
TIMED = 5  # steps timed to choose the number of steps


def paired(place: Place) -> Iterator[Row]:
    """Train the three models within the minutes of `place`, and yield the held-out loss of each."""
    assert place.train_minutes is not None
    sizes = {"batch": 2, "seq_len": 32, "hidden": 64, "layers": 2, "vocab": 300}
    if not place.toy:
        sizes = {"batch": 32, "seq_len": 512, "hidden": 512, "layers": 8, "vocab": 8192}
    work = workload(recipe=None, pondering_steps=STEPS, dtype=place.dtype, device=place.device, **sizes)
    tokens = _tokens(work, files=5 if place.toy else 2000)
    each = {steps: _step_seconds(work, tokens, steps) for steps in (STEPS, 0)}
    number = max(1, int(0.9 * 60 * place.train_minutes / (2 * each[STEPS] + each[0])))
    longer = max(1, round(number * each[STEPS] / each[0]))
    base = None
    for name, steps, count in (
        (f"S = {STEPS}", STEPS, number),
        ("vanilla, equal tokens", 0, number),
        ("vanilla, equal time", 0, longer),
    ):
        began = time.monotonic()
        loss = _train(work, tokens, steps, count)
        took, seen = time.monotonic() - began, count * work.tokens
        base = loss if base is None else base
        values = {"pondering_steps": steps, "steps": count, "tokens": seen, "seconds": took, "loss": loss}
        beside = f"{loss - base:+.4f} to S = {STEPS}; one seed; {work.line()}"
        yield Row(name, f"held-out loss {loss:.4f} after {seen / 1e6:.3g} M tokens, {took:.0f} s", beside, values)


def _tokens(work: Workload, files: int) -> Tensor:
    """The text as tokens, on the CPU."""
    from tokenizers import ByteLevelBPETokenizer

    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))[:files]
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in paths if "site-packages" not in path.parts]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=work.model.vocab_size or 0, show_progress=False)
    tokens = torch.tensor([token for found in tokenizer.encode_batch(texts) for token in found.ids])
    if len(tokens) < 4 * (work.tokens + work.batch):
        raise ConfigError(f"{sysconfig.get_path('stdlib')}: {len(tokens):,} tokens of source, too few to train on")
    return tokens


def _batch(work: Workload, tokens: Tensor, number: int) -> Tensor:
    """The rows of step `number`, which are the same for every model. The number seeds the positions in the text."""
    generator = torch.Generator().manual_seed(number)
    starts = torch.randint(0, len(tokens) - work.seq_len - 1, (work.batch,), generator=generator)
    return torch.stack([tokens[start : start + work.seq_len + 1] for start in starts.tolist()]).to(work.device)


def _step_seconds(work: Workload, tokens: Tensor, steps: int) -> float:
    training, rows = Training(work), _batch(work, tokens, 0)
    training.step("none", steps, sequences=rows)
    began = time.monotonic()
    for _ in range(TIMED):
        training.step("none", steps, sequences=rows)  # returns the loss, so the step has finished
    return (time.monotonic() - began) / TIMED


def _train(work: Workload, tokens: Tensor, steps: int, count: int) -> float:
    """Train for `count` steps. Returns the held-out loss."""
    seen, held = tokens[: -int(HELD_OUT * len(tokens))], tokens[-int(HELD_OUT * len(tokens)) :]
    training: Any = Training(work)
    for number in range(count):
        done = (number + 1) / count
        training.rate(RATE * min(1.0, done / WARM_UP) * (0.1 + 0.45 * (1 + math.cos(math.pi * done))))
        training.step("none", steps, sequences=_batch(work, seen, number))
    length = work.seq_len + 1
    rows = held[: len(held) // length * length].view(-1, length)[:256]
    losses = []
    with torch.no_grad():
        for some in rows.split(work.batch):
            losses += [training.loss("none", steps, sequences=some.to(work.device)).item()] * len(some)
    return sum(losses) / len(losses)
