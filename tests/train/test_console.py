"""The lines of a training's log fit a terminal, whatever the run is."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import pytest

from ponder_scale.cli import Timed
from ponder_scale.train.console import COLUMNS, evaluation_lines, folded, step_line, tasks_lines

SMALL = {
    "loss": 7.8104,
    "pass_losses": [7.9, 7.85, 7.8104],
    "pass_entropies": [7.0, 7.1, 7.123],
    "grad_norm": 0.7134,
    "lr": 3e-4,
    "tokens_per_second": 2048.4,
    "mfu": None,
    "memory_gib": 0.03,
    "seconds_left": 0.0,
}


def test_a_step_of_a_small_run_has_everything() -> None:
    line = step_line(4, 4, {**SMALL, "pass_losses": [7.8104]})
    assert line == (
        "step 4/4  loss 7.8104  passes 7.810  entropy 7.12  norm 0.713  lr 3.00e-04  2,048 tok/s  30.7 MiB  left 0s"
    )


def test_a_step_says_what_it_trained_where_that_is_not_the_last_pass() -> None:
    line = step_line(4, 4, {**SMALL, "pass_losses": [7.8104], "trained_loss": 7.8432})
    assert line.startswith("step 4/4  loss 7.8104  trained 7.8432  passes 7.810  ")


@pytest.mark.parametrize("passes", [1, 4, 9, 32])
@pytest.mark.parametrize(
    "wild",
    [
        {},
        {"loss": 1e38, "grad_norm": math.inf},
        {"loss": math.nan, "grad_norm": 7e9},
        {"trained_loss": 7.8432, "grad_norm": 7e9},
    ],
)
def test_a_step_of_any_run_fits(passes: int, wild: dict[str, Any]) -> None:
    large = {"tokens_per_second": 123_456_789.0, "mfu": 0.412, "memory_gib": 71.25, "seconds_left": 2.6e6}
    losses = {"pass_losses": [12.345] * (passes - 1) + [wild.get("loss", 12.3)]}
    line = step_line(1_234_567, 1_800_000, {**SMALL, **large, **losses, **wild})
    assert len(line) <= COLUMNS
    assert line.startswith("step 1234567/1800000  loss ") and line.endswith("  left 30d02h")
    assert "123.457M tok/s" in line and "MFU 41.2%" in line and "norm " in line


@pytest.mark.parametrize("passes", [1, 4, 32])
@pytest.mark.parametrize("source", ["web", "a-source-with-a-rather-long-name"])
def test_an_evaluation_fits(passes: int, source: str) -> None:
    for bits, last in ((None, ""), (1.2345, "  bits per byte 1.2345")):
        lines = evaluation_lines(1_234_567, 1_800_000, source, 65_536, [math.inf, 7.9e8, *[12.345] * passes], bits)
        assert all(len(line) <= COLUMNS for line in lines) and len(lines) <= 2
        assert "pass 0 inf  pass 1 7.90e+08" in lines[-1] and lines[-1].endswith(f"pass {passes + 1} 12.35{last}")


def test_tasks_are_told_in_lines_that_fit_without_the_errors_of_their_metrics() -> None:
    scores = {f"task-{number}": {"acc,none": 0.25, "acc_stderr,none": 0.01} for number in range(9)}
    lines = tasks_lines(1_234_567, 1_800_000, scores, None, 75.0)
    assert all(len(line) <= COLUMNS for line in lines) and "stderr" not in "".join(lines)
    assert lines[0].startswith("step 1234567/1800000  tasks, in 1m15s: task-0 acc 0.2500, task-1")
    (line,) = tasks_lines(4, 8, {}, "ValueError: no data", 2.0)
    assert line == "step 4/8  tasks, in 2s: failed, and training continues: ValueError: no data"


def test_a_sentence_is_folded_and_a_path_stays_whole() -> None:
    path = "/a/" + "long-" * 40 + "path"
    lines = folded(f"{'word ' * 40}{path} {'word ' * 10}")
    assert len(lines) > 2 and any(path in line for line in lines)
    assert all(len(line) <= COLUMNS for line in lines if path not in line)


def test_lines_carry_the_time_of_day_and_each_day_its_date() -> None:
    formatter = Timed()
    texts = []
    for hour in range(24):
        record = logging.LogRecord("x", logging.INFO, "", 0, "step %d", (hour,), None)
        record.created = 1_800_000_000.0 + hour * 3600.0 + 1800.0 * (hour > 0)
        texts += formatter.format(record).split("\n")
    assert sum(re.fullmatch(r"\d\d:\d\d:\d\d step \d+", text) is not None for text in texts) == 24
    dates = [text for text in texts if re.fullmatch(r"== \d{4}-\d\d-\d\d", text)]
    assert len(texts) == 24 + len(dates) and len(set(dates)) == len(dates) == 2 and texts[0] == dates[0]
