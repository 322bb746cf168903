"""Write the report of a comparison: a table and verdicts as Markdown, all data as JSON, and a page with the curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ponder_scale.compare.answers import Answers
from ponder_scale.compare.answers import chart as answers_chart
from ponder_scale.compare.answers import table as answers_table
from ponder_scale.compare.findings import Result, half_width, members_of, verdicts
from ponder_scale.evaluate.plot import line_chart
from ponder_scale.figures import count, json_text, perplexity, shown, span
from ponder_scale.runs.page import page
from ponder_scale.settings import to_dict

COLUMNS = (
    *("model", "what it is", "parameters", "tokens", "FLOPs", "time"),
    *("held-out loss", "perplexity", "bits per byte", "seeds"),
)
AXES = {"step": "training step", "tokens": "training tokens", "flops": "training FLOPs"}
LEFT_OUT = 0.1  # share of each training that its curve leaves out at the start, where it falls too steeply

_CONTENT = """<style>
  td:nth-child(n+3) {{ text-align: right }}
  svg {{ width: 100%; max-width: 900px; display: block }}
</style>
{tables}
<p>{notes}</p><ul>{verdicts}</ul>
{charts}"""


def write_report(out: Path, results: Sequence[Result], missing: Sequence[str], answers: Sequence[Answers] = ()) -> str:
    """Write compare.md, .json and .html and an SVG of each curve into `out`. Returns the Markdown.

    Args:
        results: results of at least one run.
        missing: names of the runs that have no evaluation yet.
        answers: answers of the runs that were asked.
    """
    found = verdicts(results)
    unfinished = [*(result.run.name for result in results if not result.finished), *missing]
    title = f"Does pondering pay? {out.name}"
    notes = _notes(results, unfinished)
    tables = {"Held-out loss": [list(COLUMNS), *_rows(results)]}
    charts = {}
    if results[0].held_out_tokens:
        charts = {
            f"compare-by-{axis}": line_chart(_curves(results, axis), label, "held-out loss, nats")
            for axis, label in AXES.items()
        }
    if answers:
        tables["Answers: share that is right, the mean and every seed"] = answers_table(answers)
        notes += " Beside the items of a group stands half of the widest 95% interval of one seed's share (binomial)."
        charts["compare-answers"] = answers_chart(answers)
    sections = [f"## {name}\n\n{_markdown(rows)}" for name, rows in tables.items()]
    text = "\n\n".join([f"# {title}", *sections, notes, "\n".join(f"- {verdict}" for verdict in found)]).rstrip() + "\n"
    content = _CONTENT.format(
        tables="".join(f"<h2>{escape(name)}</h2>{_html(rows)}" for name, rows in tables.items()),
        notes=escape(notes),
        verdicts="".join(f"<li>{escape(str(verdict))}</li>" for verdict in found),
        charts="".join(charts.values()),
    )
    facts = {
        "members": [_content(member.name, results) for member in members_of(results)],
        "verdicts": [{**vars(verdict), "text": str(verdict)} for verdict in found],
        "answers": {each.run.name: each.groups for each in answers},
        "unfinished": unfinished,
    }
    for name, chart in charts.items():
        (out / f"{name}.svg").write_text(chart, encoding="utf-8")
    (out / "compare.md").write_text(text, encoding="utf-8")
    (out / "compare.html").write_text(page(title, content), encoding="utf-8")
    (out / "compare.json").write_text(json_text(facts, indent=1) + "\n", encoding="utf-8")
    return text


def _notes(results: Sequence[Result], unfinished: Sequence[str]) -> str:
    held_out_tokens = results[0].held_out_tokens
    bits = (
        "Bits per byte are all bits of these tokens over the bytes of their text."
        if any(result.bits_per_byte is not None for result in results)
        else "There are no bits per byte, because the bytes of the tokens are not known; the runs' logs say why."
    )
    loss = (
        f"Loss in nats of the last pass over {held_out_tokens:,} held-out tokens, mean over seeds +- half of its 95% "
        f"interval. {bits}"
        if held_out_tokens
        else "Nothing is held out, so there is no held-out loss."
    )
    return (
        f"{loss} FLOPs are those that the model needs, without recomputation. Time is that of training steps alone. "
        f"Not finished: {', '.join(unfinished) or 'none'}."
    )


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _html(rows: Sequence[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f'<div class="scroll"><table>{"".join(f"<tr>{row}</tr>" for row in cells)}</table></div>'


def _rows(results: Sequence[Result]) -> list[list[str]]:
    rows: list[list[str]] = []
    for member in members_of(results):
        done = [result for result in results if result.run.member == member and result.finished]
        measured, tokens, flops = ("-",) * 4, float(member.tokens), member.flops
        if done:
            losses = [result.loss for result in done]
            mean, spread = statistics.fmean(losses), half_width(losses)
            around = "" if spread is None else f" +- {spread:.4f}"
            tokens, flops = (
                statistics.fmean(result.amount(axis, member.steps) for result in done) for axis in ("tokens", "flops")
            )
            held_out = ("-",) * 3
            if done[0].held_out_tokens:
                held_out = (f"{mean:.4f}{around}", shown(perplexity(mean)), _bits(done))
            measured = (span(statistics.fmean(result.seconds for result in done)), *held_out)
        size = (count(member.parameters), count(tokens), f"{flops:.3g}")
        rows.append([member.name, member.about, *size, *measured, str(len(done))])
    return rows


def _bits(done: Sequence[Result]) -> str:
    """The mean of the bits per byte over seeds, if all seeds know theirs."""
    bits = [result.bits_per_byte for result in done if result.bits_per_byte is not None]
    return f"{statistics.fmean(bits):.4f}" if len(bits) == len(done) else "-"


def _curves(results: Sequence[Result], axis: str) -> dict[str, list[tuple[float, float]]]:
    """The curve of each member: its held-out loss, averaged over seeds, at evaluations that all its seeds have."""
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
            "bits_per_byte": result.bits_per_byte,
            "seconds": result.seconds,
            "held_out_tokens": result.held_out_tokens,
            "curve": result.curve,
            "trained": result.trained,
        }
        for result in of_member
    ]
    member = of_member[0].run.member
    return {**vars(member), "steps": member.steps, "train": to_dict(member.train), "runs": runs}
