"""Reduce the record of a run to the few numbers that a page can draw.

This module uses numpy and not torch, because reports are also made on login nodes.
"""

from __future__ import annotations

import json
import math
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ponder_scale.errors import ConfigError
from ponder_scale.runs.records import HISTORY, METRICS, read
from ponder_scale.settings import flat

POINTS = 800  # most points of a curve; in a long run each point stands for several logged steps
EVENTS = 2000  # most events of a run that are drawn; if there are more, the oldest saves are left out
AXES = ("step", "tokens", "flops", "hours")
NOT_DRAWN = ("event", "attempt")


def read_run(run_dir: Path, name: str) -> dict[str, Any]:
    """The data of a run that the page shows, as JSON values.

    Returns:
        A dictionary of name, config (flat), summary, x (step, tokens, FLOPs and hours of each point), series (the mean
        of each point, by key), low and high (the extremes, if a point stands for several steps), evaluations, tasks
        and events.

    Raises:
        ConfigError: it is no run folder, or no step was recorded in it.
    """
    path = run_dir / METRICS
    if not path.is_file():
        raise ConfigError(f"{run_dir}: no {METRICS} in it; expected the run_dir of a run")
    table = _Table()
    evaluations, tasks, events = [], [], []
    for record in read(path):
        if record["event"] == "step":
            table.add(record)
        elif record["event"] == "evaluation":
            evaluations.append({key: value for key, value in record.items() if key not in NOT_DRAWN})
        elif record["event"] == "tasks":
            tasks.append({key: value for key, value in record.items() if key not in NOT_DRAWN})
        elif record["event"] in HISTORY:
            events.append(record)
    if not len(table):
        raise ConfigError(f"{path}: no step is recorded in it yet")
    columns = table.columns()
    columns["hours"] = (columns.pop("time") - columns_begin(columns, table.begin)) / 3600.0
    x, series, low, high = thin(columns, POINTS)
    return {
        "name": name,
        "config": _config(run_dir),
        "summary": _summary(columns, evaluations, events, table.last),
        "x": x,
        "series": series,
        "low": low,
        "high": high,
        "evaluations": _thin_list(evaluations, POINTS),
        "tasks": _thin_list(tasks, POINTS),
        "events": _fewer_events(events),
    }


def columns_begin(columns: dict[str, np.ndarray], first_time: float) -> float:
    """The time at which the first recorded step began, in seconds since the epoch."""
    took = columns.get("seconds_per_step")
    return first_time - (float(took[0]) if took is not None and math.isfinite(took[0]) else 0.0)


def thin(
    columns: dict[str, np.ndarray], points: int
) -> tuple[dict[str, list[Any]], dict[str, list[Any]], dict[str, list[Any]], dict[str, list[Any]]]:
    """Curves of at most `points` points, each of which stands for a stretch of steps.

    Returns the axes at the end of each stretch, and the mean, lowest and highest value of each curve by key. Lowest and
    highest are given if stretches have several steps, so that a spike of one step stays visible.
    """
    count = len(columns["step"])
    width = -(-count // points)
    starts = np.arange(0, count, width)
    ends = np.minimum(starts + width, count) - 1
    x = {axis: _numbers(columns[axis][ends]) for axis in AXES if axis in columns}
    series, low, high = {}, {}, {}
    for key, values in columns.items():
        if key in AXES:
            continue
        known = np.isfinite(values)
        counts = np.add.reduceat(known, starts, dtype=np.int64)
        sums = np.add.reduceat(np.where(known, values, 0.0), starts)
        empty = counts == 0
        series[key] = _numbers(np.where(empty, np.nan, sums / np.maximum(counts, 1)))
        if width > 1:
            lowest = np.minimum.reduceat(np.where(known, values, np.inf), starts)
            highest = np.maximum.reduceat(np.where(known, values, -np.inf), starts)
            low[key], high[key] = _numbers(lowest), _numbers(highest)
    return x, series, low, high


class _Table:
    """The numbers of the steps, in one column for each key. Elements of lists get columns `name/index`."""

    def __init__(self) -> None:
        self._columns: dict[str, array[float]] = {}
        self._count = 0
        self.begin = 0.0
        self.last: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._count

    def add(self, record: dict[str, Any]) -> None:
        for key, value in record.items():
            if isinstance(value, list):
                for index, entry in enumerate(value):
                    self._put(f"{key}/{index}", entry)
            elif key not in NOT_DRAWN:
                self._put(key, value)
        self.begin = self.begin or record["time"]
        self._count += 1
        self.last = record

    def _put(self, key: str, value: Any) -> None:
        if not isinstance(value, (int, float)):
            return
        column = self._columns.setdefault(key, array("d"))
        if len(column) < self._count:
            column.extend([math.nan] * (self._count - len(column)))
        column.append(value)

    def columns(self) -> dict[str, np.ndarray]:
        for column in self._columns.values():
            column.extend([math.nan] * (self._count - len(column)))
        return {key: np.frombuffer(column) for key, column in self._columns.items()}


def _summary(
    columns: dict[str, np.ndarray], evaluations: list[Any], events: list[dict[str, Any]], last: dict[str, Any]
) -> dict[str, Any]:
    def middle(key: str) -> float | None:
        values = columns.get(key, np.empty(0))
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    counts = Counter(record["event"] for record in events)
    ended = events[-1].get("reason") if events and events[-1]["event"] == "end" else None
    return {
        **{key: last.get(key) for key in ("step", "tokens", "flops", "loss")},
        "hours": float(columns["hours"][-1]),
        "held_out": evaluations[-1]["losses"][-1] if evaluations else None,
        "bits_per_byte": (evaluations[-1].get("bits_per_byte") or [None])[-1] if evaluations else None,
        **{key: middle(key) for key in ("tokens_per_second", "mfu", "hfu")},
        "memory_gib": float(np.nanmax(columns["memory_gib"])) if "memory_gib" in columns else None,
        "attempts": last.get("attempt", 1),
        **{event: counts[event] for event in ("save", "resume", "skip", "rewind", "straggler", "alarm")},
        "ended": ended,
    }


def _config(run_dir: Path) -> dict[str, str]:
    """The settings of the run as text, by full key."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: empty or damaged; expected the settings of the run; start the run again to rewrite them"
        )
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in flat(values).items()}


def _fewer_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All events except saves, and as many of the newest saves as there is room for."""
    others = sum(record["event"] != "save" for record in events)
    surplus = max(0, sum(record["event"] == "save" for record in events) - max(0, EVENTS - others))
    kept = []
    for record in events:
        if record["event"] == "save" and surplus:
            surplus -= 1
            continue
        kept.append(record)
    return kept[-EVENTS:]


def _thin_list(values: list[Any], points: int) -> list[Any]:
    """Every n-th value, so that at most `points` + 1 remain, and always the last."""
    stride = -(-len(values) // points) or 1
    return values[::stride] + (values[-1:] if values and (len(values) - 1) % stride else [])


def _numbers(values: np.ndarray) -> list[Any]:
    """The values to six digits. Whole numbers become integers, and missing numbers None."""
    return [
        None
        if not math.isfinite(value)
        else int(value)
        if value == int(value) and abs(value) < 2**53
        else float(f"{value:.6g}")
        for value in values.tolist()
    ]
