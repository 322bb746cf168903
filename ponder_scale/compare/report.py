"""The report of a comparison: a table and verdicts as Markdown, everything as JSON, and a page with the curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ponder_scale.compare.findings import Result, half_width, members_of, verdicts
from ponder_scale.evaluate.plot import line_chart
from ponder_scale.figures import count, json_text, perplexity, shown, span
from ponder_scale.runs.page import page
from ponder_scale.settings import to_dict

COLUMNS = ("model", "what it is", "parameters", "tokens", "FLOPs", "time", "held-out loss", "perplexity", "seeds")
AXES = {"step": "training step", "tokens": "training tokens", "flops": "training FLOPs"}
LEFT_OUT = 0.1  # of each training, at the beginning of its curve: the first fall would flatten the rest

_CONTENT = """<style>
  #members td:nth-child(n+3), #members th:nth-child(n+3) {{ text-align: right }}
  svg {{ width: 100%; max-width: 900px; display: block }}
</style>
<div class="scroll"><table id="members">{table}</table></div>
<p>{notes}</p><ul>{verdicts}</ul>
{charts}"""


def write_report(out: Path, results: Sequence[Result], missing: Sequence[str]) -> str:
    """Write compare.md, .json and .html and an SVG of each curve into `out`; returns the Markdown.

    Args:
        results: of at least one run.
        missing: names of the runs that have no evaluation yet.
    """
    found = verdicts(results)
    unfinished = [*(result.run.name for result in results if not result.finished), *missing]
    title = f"Does pondering pay? {out.name}"
    notes = (
        f"Loss in nats of the last pass over {results[0].held_out_tokens:,} held-out tokens, mean over seeds +- half "
        "of its 95% interval. FLOPs are those the model needs, recomputation not counted; time is that of training "
        f"steps alone. Not finished: {', '.join(unfinished) or 'none'}."
    )
    rows = [COLUMNS, *_rows(results)]
    table = [f"| {' | '.join(row)} |" for row in (rows[0], ("---",) * len(COLUMNS), *rows[1:])]
    text = "\n".join([f"# {title}", "", *table, "", notes, "", *(f"- {verdict}" for verdict in found), ""])
    charts = {axis: line_chart(_curves(results, axis), label, "held-out loss, nats") for axis, label in AXES.items()}
    cells = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    content = _CONTENT.format(
        table="".join(f"<tr>{row}</tr>" for row in cells),
        notes=escape(notes),
        verdicts="".join(f"<li>{escape(str(verdict))}</li>" for verdict in found),
        charts="".join(f"<h2>By {label}</h2>{charts[axis]}" for axis, label in AXES.items()),
    )
    facts = {
        "members": [_content(member.name, results) for member in members_of(results)],
        "verdicts": [{**vars(verdict), "text": str(verdict)} for verdict in found],
        "unfinished": unfinished,
    }
    for axis, chart in charts.items():
        (out / f"compare-by-{axis}.svg").write_text(chart, encoding="utf-8")
    (out / "compare.md").write_text(text, encoding="utf-8")
    (out / "compare.html").write_text(page(title, content), encoding="utf-8")
    (out / "compare.json").write_text(json_text(facts, indent=1) + "\n", encoding="utf-8")
    return text


def _rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for member in members_of(results):
        done = [result for result in results if result.run.member == member and result.finished]
        measured, tokens, flops = ("-",) * 3, float(member.tokens), member.flops
        if done:
            losses = [result.loss for result in done]
            mean, spread = statistics.fmean(losses), half_width(losses)
            around = "" if spread is None else f" +- {spread:.4f}"
            tokens, flops = (
                statistics.fmean(result.amount(axis, member.steps) for result in done) for axis in ("tokens", "flops")
            )
            seconds = statistics.fmean(result.seconds for result in done)
            measured = (span(seconds), f"{mean:.4f}{around}", shown(perplexity(mean)))
        size = (count(member.parameters), count(tokens), f"{flops:.3g}")
        rows.append((member.name, member.about, *size, *measured, str(len(done))))
    return rows


def _curves(results: Sequence[Result], axis: str) -> dict[str, list[tuple[float, float]]]:
    """The mean over seeds of each member's held-out loss, at the evaluations that all its seeds have."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for member in members_of(results):
        of_seeds = [result for result in results if result.run.member == member]
        curves_of_seeds = [dict(result.curve) for result in of_seeds]
        shared = set.intersection(*(set(curve) for curve in curves_of_seeds))
        points = [
            (
                step if axis == "step" else statistics.fmean(result.amount(axis, step) for result in of_seeds),
                statistics.fmean(curve[step] for curve in curves_of_seeds),
            )
            for step in sorted(shared)
            if step >= LEFT_OUT * member.steps
        ]
        if points:
            curves[member.name] = points
    return curves


def _content(name: str, results: Sequence[Result]) -> dict[str, Any]:
    of_member = [result for result in results if result.run.member.name == name]
    runs = [
        {
            "seed": result.run.seed,
            "run_dir": str(result.run.run_dir),
            "finished": result.finished,
            "loss": result.loss,
            "perplexity": perplexity(result.loss),
            "seconds": result.seconds,
            "held_out_tokens": result.held_out_tokens,
            "curve": result.curve,
            "trained": result.trained,
        }
        for result in of_member
    ]
    member = of_member[0].run.member
    return {**vars(member), "steps": member.steps, "train": to_dict(member.train), "runs": runs}
