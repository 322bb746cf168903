"""metrics.jsonl over several attempts: no line of a step twice, none lost, and the history kept."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.errors import FencedError
from ponder_scale.runs import attempts
from ponder_scale.runs.records import METRICS, SUPERSEDED, Recorder, read, read_end


def an_attempt(run_dir: Path, attempt: int, first: int, last: int, saves: tuple[int, ...]) -> None:
    """Steps first to last with a line each, and saves; ended by a crash, that is, without close."""
    recorder = Recorder(run_dir, start_step=first - 1, attempt=attempt)
    if first > 1:
        recorder.write("resume", first - 1)
    for step in range(first, last + 1):
        recorder.write("step", step, loss=1.0 / step)
        if step in saves:
            recorder.sync()
            recorder.write("save", step)


def lines(path: Path, *events: str) -> list[tuple[str, int, int]]:
    found = [(line["event"], line["step"], line["attempt"]) for line in read(path)]
    return [line for line in found if not events or line[0] in events]


def test_three_attempts_leave_each_step_once_and_all_of_the_history(tmp_path: Path) -> None:
    an_attempt(tmp_path, 1, 1, 7, (3, 6))
    an_attempt(tmp_path, 2, 4, 9, (6, 9))  # the save of step 6 was damaged
    an_attempt(tmp_path, 3, 7, 12, (9, 12))
    path = tmp_path / METRICS
    expected = [*((step, 1) for step in (1, 2, 3)), *((step, 2) for step in (4, 5, 6))]
    expected += [(step, 3) for step in range(7, 13)]
    assert [(step, attempt) for _, step, attempt in lines(path, "step")] == expected
    history = [("save", 3, 1), ("save", 6, 1), ("resume", 3, 2), ("save", 6, 2), ("save", 9, 2)]
    assert lines(path, "save", "resume") == [*history, ("resume", 6, 3), ("save", 9, 3), ("save", 12, 3)]
    moved = lines(tmp_path / SUPERSEDED)
    assert moved == [("step", step, 1) for step in range(4, 8)] + [("step", step, 2) for step in range(7, 10)]
    times = [line["time"] for line in read(path)]
    assert times == sorted(times)


def test_a_start_that_dies_while_lines_move_repeats_and_loses_none(tmp_path: Path) -> None:
    """Killed after the old lines were copied and before they left the record; then in the middle of copying them."""
    an_attempt(tmp_path, 1, 1, 7, ())
    path, superseded = tmp_path / METRICS, tmp_path / SUPERSEDED
    before = path.read_bytes()
    Recorder(tmp_path, start_step=3, attempt=2)
    moved = superseded.read_bytes()
    for remains in (moved, moved[: len(moved) // 2]):
        path.write_bytes(before)
        superseded.write_bytes(remains)
        recorder = Recorder(tmp_path, start_step=3, attempt=3)
        assert lines(superseded) == [("step", step, 1) for step in range(4, 8)]
        assert lines(path, "step") == [("step", step, 1) for step in range(1, 4)] and recorder.reached == 7
    # the same step of another attempt is another line
    recorder.write("step", 4, loss=0.5)
    Recorder(tmp_path, start_step=3, attempt=4)
    assert lines(superseded) == [*(("step", step, 1) for step in range(4, 8)), ("step", 4, 3)]


def test_the_evaluations_of_all_attempts_are_known(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, start_step=0, attempt=1)
    for step in (2, 4, 6):
        recorder.write("evaluation", step, losses=[1.0])
    recorder.write("alarm", 8, kind="x", message="x")
    for attempt in (2, 3):  # the lines after step 3 are in the record, then superseded
        again = Recorder(tmp_path, start_step=3, attempt=attempt)
        assert (again.evaluated, again.evaluations, again.reached) == (2, {2, 4, 6}, 0)  # no step has a line


def test_an_attempt_that_lost_the_run_records_nothing_more(tmp_path: Path) -> None:
    """A rank behind a cut cable still reaches the file system, while its successor trains."""
    older = attempts.claim(tmp_path)
    old = Recorder(tmp_path, start_step=0, attempt=older, check_owned=lambda: attempts.check_owned(tmp_path, older))
    old.write("step", 1, loss=1.0)
    newer = attempts.claim(tmp_path)
    new = Recorder(tmp_path, start_step=1, attempt=newer, check_owned=lambda: attempts.check_owned(tmp_path, newer))
    with pytest.raises(FencedError, match="attempt 2 has taken the run over"):
        old.write("step", 2, loss=1.0)
    new.write("step", 2, loss=1.0)
    assert lines(tmp_path / METRICS) == [("step", 1, 1), ("step", 2, 2)]


def test_a_line_cut_off_by_a_crash_is_left_out_and_nothing_joins_it(tmp_path: Path) -> None:
    an_attempt(tmp_path, 1, 1, 3, ())
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"event":"step","step":4,"lo')
    an_attempt(tmp_path, 2, 4, 5, ())
    assert [step for _, step, _ in lines(tmp_path / METRICS, "step")] == [1, 2, 3, 4, 5]
    assert all(json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines())


def test_a_full_disk_loses_and_tears_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It takes a part of a line, then nothing, then all: by the limit that the system sets on the size of files."""
    recorder = Recorder(tmp_path, start_step=0, attempt=1)
    recorder.write("step", 1, loss=1.0)
    size, limits = (tmp_path / METRICS).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        recorder.write("step", 2, loss=0.5)
        recorder.write("alarm", 2, kind="save failed", message="no space")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / METRICS).stat().st_size == size + 10
    assert caplog.text.count("lines are kept in memory until there is room") == 1
    recorder.write("step", 3, loss=0.25)
    recorder.close()
    assert lines(tmp_path / METRICS) == [("step", 1, 1), ("step", 2, 1), ("alarm", 2, 1), ("step", 3, 1)]
    assert "damaged" not in caplog.text


def test_the_last_step_of_any_attempt_is_known(tmp_path: Path) -> None:
    an_attempt(tmp_path, 1, 1, 9, ())
    assert Recorder(tmp_path, start_step=3, attempt=2).reached == 9
    assert Recorder(tmp_path, start_step=2, attempt=3).reached == 9  # its lines are superseded now


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("-inf")]])
def test_what_json_has_no_number_for_is_null(tmp_path: Path, value: Any) -> None:
    recorder = Recorder(tmp_path, start_step=0, attempt=1)
    recorder.write("step", 1, loss=value)
    recorder.close()
    (line,) = read(tmp_path / METRICS)
    assert line["loss"] is None or line["loss"] == [1.0, None]
    assert "NaN" not in (tmp_path / METRICS).read_text()


def test_the_end_of_a_long_record_is_read_without_the_rest(tmp_path: Path) -> None:
    an_attempt(tmp_path, 1, 1, 500, ())
    found = read_end(tmp_path / METRICS, 1000)
    assert found[-1]["step"] == 500 and 5 < len(found) < 20
    assert [line["step"] for line in read_end(tmp_path / METRICS, 10**6)] == list(range(1, 501))


def test_an_attempt_owns_nothing_before_it_has_a_number_and_until_another_comes(tmp_path: Path) -> None:
    older, peer = attempts.Attempt(tmp_path), attempts.Attempt(tmp_path)
    older.check_owned()  # a heartbeat before the run is taken over
    older.claim()
    peer.join(older.number)
    for each in (older, peer):
        each.check_owned()
    newer = attempts.Attempt(tmp_path)
    newer.check_owned()
    newer.claim()
    assert (older.number, newer.number) == (1, 2)
    for each in (older, peer):
        with pytest.raises(FencedError, match="attempt 2 has taken the run over"):
            each.check_owned()
