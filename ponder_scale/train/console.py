"""The lines of a training's log: what a step and an evaluation say, within the width of a terminal or a Slurm log.

Everything is in metrics.jsonl; a line leaves out what it has no room for, the least important first.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ponder_scale.figures import duration, rate, size

COLUMNS = 120 - len("12:34:56 ")  # the command line puts the time of day before each line
PASSES = 4  # that a line names: of more, the first two and the last
LEFT_OUT = ("entropy", "memory", "lr", "passes", "mfu", "norm", "speed", "loss")  # in this order, where room is short


def step_line(step: int, steps: int, values: dict[str, Any]) -> str:
    """A step, from what is recorded of it."""
    losses = [_fixed(loss, 3) for loss in values["pass_losses"]]
    parts = {
        "step": f"step {step}/{steps}",
        "loss": f"loss {_fixed(values['loss'], 4)}",
        "passes": f"passes {' '.join(_few(losses))}",
        "entropy": f"entropy {_fixed(values['pass_entropies'][-1], 2)}",
        "norm": f"norm {_fixed(values['grad_norm'], 3)}",
        "lr": f"lr {values['lr']:.2e}",
        "speed": f"{rate(values['tokens_per_second'])} tok/s",
        "mfu": "" if values["mfu"] is None else f"MFU {values['mfu']:.1%}",
        "memory": size(values["memory_gib"] * 2**30),
        "left": f"left {duration(values['seconds_left'])}",
    }
    for name in LEFT_OUT:
        line = "  ".join(filter(None, parts.values()))
        if len(line) <= COLUMNS:
            break
        parts[name] = ""
    return line


def evaluation_lines(
    step: int, steps: int, source: str, tokens: int, perplexities: Sequence[float], bits: float | None = None
) -> list[str]:
    """An evaluation of a source: one line, or a second one for what the first has no room for.

    Args:
        bits: a byte, of the last pass; None: not known.
    """
    head = f"step {step}/{steps}  held-out perplexity of {source} over {tokens} tokens:"
    passes = [f"pass {index} {_fixed(value, 2)}" for index, value in enumerate(perplexities)]
    last = [] if bits is None else [f"bits per byte {_fixed(bits, 4)}"]
    for shown in ([*passes, *last], [*_few(passes), *last]):
        if len(line := f"{head} {'  '.join(shown)}") <= COLUMNS:
            return [line]
    return [head, f"    {'  '.join([*_few(passes), *last])}"]


def tasks_lines(
    step: int, steps: int, scores: Mapping[str, Mapping[str, float]], failure: str | None, seconds: float
) -> list[str]:
    """The tasks of a step: their metrics, without the errors that the harness estimates, or what failed."""
    head = f"step {step}/{steps}  tasks, in {duration(seconds)}:"
    if failure is not None:
        return folded(f"{head} failed, and training goes on: {failure}")
    found = (
        f"{task} {metric.removesuffix(',none')} {_fixed(value, 4)}"
        for task, metrics in scores.items()
        for metric, value in metrics.items()
        if "_stderr" not in metric
    )
    return folded(f"{head} {', '.join(found)}")


def folded(text: str) -> list[str]:
    """A sentence as lines that fit; a longer word, such as a path, stays whole."""
    return textwrap.wrap(text, COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _few(passes: list[str]) -> list[str]:
    return passes if len(passes) <= PASSES else [*passes[:2], "..", passes[-1]]


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"
