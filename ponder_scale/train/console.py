"""The lines of the training log for a step and for an evaluation, cut to the width of a terminal or a Slurm log.

metrics.jsonl has all the numbers. A line that is too long drops parts, the least important first.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ponder_scale.figures import duration, rate, size

COLUMNS = 120 - len("12:34:56 ")  # the command line puts the time of day before each line
PASSES = 4  # most passes that a line shows; with more, it shows the first two and the last
LEFT_OUT = (
    "entropy",
    "memory",
    "lr",
    "passes",
    "mfu",
    "trained",
    "norm",
    "speed",
    "loss",
)  # dropped in this order to fit


def step_line(step: int, steps: int, values: dict[str, Any]) -> str:
    """The line of a step, from its record."""
    losses = [_fixed(loss, 3) for loss in values["pass_losses"]]
    parts = {
        "step": f"step {step}/{steps}",
        "loss": f"loss {_fixed(values['loss'], 4)}",
        "trained": f"trained {_fixed(values['trained_loss'], 4)}" if "trained_loss" in values else "",
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
    """The line of an evaluation of one source, and a second line if the first has no room for everything.

    Args:
        bits: bits per byte of the last pass, or None if they are not known.
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
    """The lines of the tasks of a step: their metrics without the harness's error estimates, or the failure."""
    head = f"step {step}/{steps}  tasks, in {duration(seconds)}:"
    if failure is not None:
        return folded(f"{head} failed, and training continues: {failure}")
    found = (
        f"{task} {metric.removesuffix(',none')} {_fixed(value, 4)}"
        for task, metrics in scores.items()
        for metric, value in metrics.items()
        if "_stderr" not in metric
    )
    return folded(f"{head} {', '.join(found)}")


def folded(text: str) -> list[str]:
    """A sentence split into lines that fit. A word that is too long, such as a path, stays whole."""
    return textwrap.wrap(text, COLUMNS, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _few(passes: list[str]) -> list[str]:
    return passes if len(passes) <= PASSES else [*passes[:2], "..", passes[-1]]


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.2e}"
