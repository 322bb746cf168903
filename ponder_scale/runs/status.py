"""`ponder-scale status RUN`: show a run at a glance.

It works on login nodes, because it needs no torch and reads only a few files: the end of metrics.jsonl, config.yaml,
attempts.jsonl, heartbeat/, the names in checkpoints/ and the requests.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ponder_scale.checkpoint.index import saved_steps
from ponder_scale.errors import ConfigError
from ponder_scale.figures import count, duration, perplexity, rate, shown, size, span
from ponder_scale.runs.records import ENDED, FAILED, HISTORY, METRICS, REFUSED, read_end
from ponder_scale.runs.requests import requested

END_BYTES = 4 * 2**20  # bytes that are read from the end of metrics.jsonl, which hold thousands of lines
EVENTS_SHOWN = 4
STALE_SECONDS, STALE_STEPS = 60.0, 5.0  # a rank whose heartbeat is older than both stands still or is gone
START_SECONDS = 3600.0  # a start without a step for this long is gone
STARTING = "start"  # the phase of a rank until its first step
OTHER_KEYS = ("event", "step", "attempt", "time")


def status(run_dir: Path, now: float | None = None) -> list[str]:
    """The lines about a run.

    Args:
        now: seconds since the epoch. The default is the present time.

    Raises:
        ConfigError: it is no run folder.
    """
    job = run_dir / "job"  # written by `ponder-scale submit`
    if not (run_dir / "config.yaml").is_file() and job.is_file():
        number = job.read_text(encoding="utf-8").strip()
        return [f"run       {run_dir}: submitted as job {number}, not begun yet; squeue --jobs={number} says why"]
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir}: no config.yaml in it; expected the run_dir of a run that has begun")
    now = time.time() if now is None else now
    steps = _planned_steps(run_dir / "config.yaml")
    path = run_dir / METRICS
    records = read_end(path, END_BYTES) if path.is_file() else []
    step = _last(records, "step")
    patience = max(STALE_SECONDS, STALE_STEPS * ((step or {}).get("seconds_per_step") or 0.0))
    hearts = _hearts(run_dir, patience, now)
    rows = [
        ("run", f"{run_dir}: {_state(records, hearts, patience, now)}"),
        *(_progress(step, steps) if step else [("step", "none recorded yet")]),
        ("held-out", _held_out(_last(records, "evaluation"))),
        ("saved", _checkpoint(run_dir, now)),
        ("attempt", _attempt(run_dir, now)),
        ("ranks", _ranks(hearts, now)),
        ("events", _events(records, now)),
        ("requests", _requests(run_dir, now)),
    ]
    return [f"{name:<9} {text}" for name, text in rows]


def _planned_steps(path: Path) -> int:
    try:
        return int(yaml.safe_load(path.read_text(encoding="utf-8"))["train"]["steps"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path}: empty or damaged; expected the settings of the run; start the run again to rewrite them"
        ) from error


def _last(records: list[dict[str, Any]], event: str) -> dict[str, Any] | None:
    return next((record for record in reversed(records) if record["event"] == event), None)


def _state(records: list[dict[str, Any]], hearts: _Hearts, patience: float, now: float) -> str:
    """The state of the run, and what happened to a newer start, if there is one."""
    known, state = _doing(records[-1] if records else None, hearts, patience, now)
    start = hearts.start
    if start is None or start["time"] <= known:
        return state
    if start["phase"] == STARTING and now - start["time"] < START_SECONDS:
        return f"{state}; starting for {duration(now - start['time'])}"
    why = start.get("why")
    became = {STARTING: "came to nothing", REFUSED: f"was refused: {why}", FAILED: f"failed: {why}"}[start["phase"]]
    return f"{state}; a start {duration(now - start['time'])} ago {became}"


def _doing(last: dict[str, Any] | None, hearts: _Hearts, patience: float, now: float) -> tuple[float, str]:
    """The state of the run by its last record and its working ranks, after the time of the newest sign of it."""
    working = [heart["time"] for heart in hearts.working]
    if last is not None and last["event"] == "end" and not any(at > last["time"] + STALE_SECONDS for at in working):
        return last["time"], f"ended ({last.get('reason', 'no reason given')}) {duration(now - last['time'])} ago"
    if len(hearts.stale) < len(working):
        return max(working), "running" if not hearts.stale else "running, but not all ranks are"
    if hearts.failed:
        at, why = hearts.failed["time"], hearts.failed.get("why")
        return at, f"ended by an error {duration(now - at)} ago: {why}"
    if hearts.every and all(heart.get("phase") == ENDED for heart in hearts.every):
        at = max(heart["time"] for heart in hearts.every)
        return at, f"ended {duration(now - at)} ago"
    if last is None and not working:
        return 0.0, "started, nothing recorded yet"
    known = max([*working, *([last["time"]] if last else [])])
    if hearts.start is not None and now - known < patience:
        return known, "running"  # a new start has overwritten the heartbeats of ranks that still train
    stopped = hearts.start is not None and hearts.start["time"] > known
    return known, f"{'not running' if stopped else 'no sign of life'} for {duration(now - known)}"


def _progress(step: dict[str, Any], steps: int) -> list[tuple[str, str]]:
    losses = " ".join(_number(loss, ".4f") for loss in step["pass_losses"])
    left = step.get("seconds_left") or 0.0
    utilization = [
        f", {name.upper()} {100 * step[name]:.1f}%" for name in ("mfu", "hfu") if isinstance(step.get(name), float)
    ]
    memory = f", memory {size(step['memory_gib'] * 2**30)}" if isinstance(step.get("memory_gib"), float) else ""
    return [
        ("step", f"{step['step']:,} of {steps:,} ({step['step'] / steps:.1%}), {count(step['tokens'])} tokens"),
        (
            "loss",
            f"{_number(step['loss'], '.4f')}, by pass {losses}; gradient norm {_number(step['grad_norm'], '.3f')}",
        ),
        (
            "speed",
            f"{rate(step.get('tokens_per_second') or 0.0)} tok/s, {_pace(step.get('seconds_per_step') or 0.0)} "
            f"a step{''.join(utilization)}{memory}",
        ),
        ("left", f"{duration(left)} of training" if left else "nothing"),
    ]


def _pace(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else span(seconds)


def _held_out(evaluation: dict[str, Any] | None) -> str:
    if evaluation is None:
        return "not evaluated yet"
    perplexities = " ".join(shown(perplexity(loss)) for loss in evaluation["losses"])
    bits = evaluation.get("bits_per_byte")
    each = f", bits per byte {bits[-1]:.4f}" if bits and bits[-1] is not None else ""
    return f"perplexity by pass {perplexities}{each}, at step {evaluation['step']:,}"


def _checkpoint(run_dir: Path, now: float) -> str:
    folders = [folder for _, folder in sorted(saved_steps(run_dir).items())]
    if not folders:
        return "no checkpoint yet"
    return f"{folders[-1].name}, {duration(now - folders[-1].stat().st_mtime)} ago; {len(folders)} kept"


def _attempt(run_dir: Path, now: float) -> str:
    path = run_dir / "attempts.jsonl"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line] if path.is_file() else []
    if not lines:
        return "not recorded"
    try:
        last = json.loads(lines[-1])
    except ValueError:
        return f"{len(lines)}, the last line is damaged"
    job, hosts = last.get("job_id"), last.get("hosts")
    where = [f"job {job}"] if job else []
    if hosts:
        where.append(f"on {', '.join(hosts[:4])}{f' and {len(hosts) - 4} more' if len(hosts) > 4 else ''}")
    if isinstance(last.get("time"), (int, float)):
        where.append(f"begun {duration(now - last['time'])} ago")
    if last.get("world_size"):
        where.append(f"{last['world_size']} ranks")
    resumed = last.get("resumed_from")
    where.append(f"continued from {resumed}" if resumed else "from the beginning")
    if last.get("changed"):
        where.append(f"changed: {', '.join(last['changed'])}")
    return f"{last.get('attempt', len(lines))}: {', '.join(where)}"


@dataclass(frozen=True)
class _Hearts:
    """The heartbeats of a run, sorted by what they say.

    Args:
        working: heartbeats of ranks in a phase of training.
        stale: those of `working` whose ranks stand still or are gone.
        start: newest heartbeat of a rank that has not reached training: it is starting, was refused, or failed.
        failed: newest heartbeat of a rank that an error has ended while it trained.
    """

    every: list[dict[str, Any]]
    working: list[dict[str, Any]]
    stale: list[dict[str, Any]]
    start: dict[str, Any] | None
    failed: dict[str, Any] | None


def _hearts(run_dir: Path, patience: float, now: float) -> _Hearts:
    every = []
    for path in sorted((run_dir / "heartbeat").glob("rank-*.json")):
        try:
            heart = json.loads(path.read_text(encoding="utf-8"))
            every.append({**heart, "rank": int(path.stem.removeprefix("rank-")), "time": float(heart["time"])})
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the file was replaced or removed in the meantime
    over = (STARTING, ENDED, REFUSED, FAILED)
    working = [heart for heart in every if heart.get("phase") not in over]
    stale = [heart for heart in working if now - heart["time"] > patience]
    early = [
        heart for heart in every if heart.get("step") is None and heart.get("phase") in (STARTING, FAILED, REFUSED)
    ]
    # When one rank is refused, the others are ended while they start. The refusal tells more than their heartbeats.
    told = [heart for heart in early if heart["phase"] != STARTING] or early
    failed = [heart for heart in every if heart.get("phase") == FAILED and heart.get("step") is not None]
    return _Hearts(every, working, stale, _newest(told), _newest(failed))


def _newest(hearts: list[dict[str, Any]]) -> dict[str, Any] | None:
    return max(hearts, key=lambda heart: heart["time"], default=None)


def _ranks(hearts: _Hearts, now: float) -> str:
    if not hearts.every:
        return "no heartbeats"
    ages = [now - heart["time"] for heart in hearts.every]
    text = f"{len(ages)}, heartbeats {duration(min(ages))} to {duration(max(ages))} ago"
    if not hearts.stale:
        return text
    named = ", ".join(
        f"rank {heart['rank']} on {heart.get('host')} at step {heart.get('step')} in {heart.get('phase')} "
        f"for {duration(now - heart['time'])}"
        for heart in sorted(hearts.stale, key=lambda heart: heart["time"])[:8]
    )
    return f"{text}; {len(hearts.stale)} stale: {named}"


def _events(records: list[dict[str, Any]], now: float) -> str:
    # The line of the attempt shows changed settings. Here they would leave no room for other events.
    shown = [record for record in records if record["event"] in HISTORY and record["event"] != "change"]
    events = shown[-EVENTS_SHOWN:]
    if not events:
        return "none"
    return "; ".join(f"{describe(record)} ({duration(now - record['time'])} ago)" for record in reversed(events))


def describe(record: dict[str, Any]) -> str:
    """An event in words, with its name, step and values."""
    values = [f"{key} {_plain(value)}" for key, value in record.items() if key not in OTHER_KEYS]
    return f"{record['event']} at step {record['step']:,}" + (f": {', '.join(values)}" if values else "")


def _requests(run_dir: Path, now: float) -> str:
    pending = [f"{path.name}, for {duration(now - path.stat().st_mtime)}" for path in requested(run_dir)]
    return "; ".join(pending) or "none pending"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
