"""What is recorded of a step: rates and FLOPs by arithmetic, alarms by their thresholds, trackers over attempts."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ponder_scale.config import RunConfig
from ponder_scale.data.heldout import HeldOut
from ponder_scale.planning.cost import Shape, flops_per_token
from ponder_scale.runs.records import METRICS, read
from ponder_scale.settings import load
from ponder_scale.train.measure import throughput as throughput_module
from ponder_scale.train.measure.metrics import Metrics, StepMeans, StepTally
from ponder_scale.train.measure.throughput import Throughput
from ponder_scale.train.measure.work import Work
from ponder_scale.train.schedules import pondering_steps

SHAPE = Shape(1000, 400, vocabulary=50, hidden=8, layers=2, sequence=16, pondering_steps=3)


def config(*overrides: str) -> RunConfig:
    fixed = ["run_dir=unused", "data.sources.any.path=unused", "data.seq_len=16", "train.steps=100"]
    return load(RunConfig, None, [*fixed, "train.global_batch=4", "train.recompute=pass", *overrides])


def worked(work: Work, *batches: int, ponder: int = 3) -> None:
    for sequences in batches:
        work.add(sequences, ponder, updated=True)


def test_rates_leave_out_what_is_not_training(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    work = Work(config(), SHAPE)
    throughput = Throughput(config(), work, peak=1e6)
    clock.now += 10.0
    worked(work, *[4] * 5)
    first = throughput.since_last(5, data_wait=1.0)
    assert (first["tokens"], first["seconds_per_step"], first["tokens_per_second"]) == (5 * 64, 2.0, 32.0)
    assert first["seconds_left"] == 190.0 and first["data_wait_share"] == pytest.approx(0.1)
    each = flops_per_token(SHAPE, "pass")
    assert first["flops"] == pytest.approx(5 * 64 * each.model)
    assert first["mfu"] == pytest.approx(5 * 64 * each.model / 10.0 / 1e6)
    assert first["hfu"] == pytest.approx(5 * 64 * each.hardware / 10.0 / 1e6)
    worked(work, 4, 4)
    clock.now += 1000.0  # a save
    throughput.restart(data_wait=5.0)
    clock.now += 3.0
    worked(work, 4, 4, 4)
    second = throughput.since_last(10, data_wait=5.3)
    assert second["seconds_per_step"] == 1.0 and second["data_wait_share"] == pytest.approx(0.1)
    assert second["mfu"] == pytest.approx(3 * 64 * each.model / 3.0 / 1e6)
    assert second["flops"] == pytest.approx(10 * 64 * each.model)


def test_the_time_left_is_told_by_a_window_and_not_by_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    work = Work(config("train.steps=1000"), SHAPE)
    throughput = Throughput(config("train.steps=1000"), work, peak=None)

    def left_after(step: int, seconds: float) -> float:
        clock.now += seconds
        worked(work, 4)
        found = throughput.since_last(step, 0.0)
        return found["seconds_left"] / (1000 - step)  # of a step

    assert left_after(1, 300.0) == 300.0  # it has compiled: nothing better is known
    assert left_after(2, 1.0) == 1.0  # and counts no more
    for step in range(3, 60):
        assert left_after(step, 1.0) == pytest.approx(1.0)
    assert 1.5 < left_after(60, 51.0) < 2.5  # a slow moment
    assert [round(left_after(step, 3.0)) for step in range(61, 112)][-1] == 3  # which has left the window


def test_flops_count_the_pondering_steps_that_were_taken_bit_for_bit_also_after_a_resume() -> None:
    random = config("train.pondering.schedule=uniform", "train.pondering.low=0", "model.pondering_steps=3")
    drawn = [pondering_steps(step, 3, random.train.pondering, random.seed) for step in range(1, 41)]
    expected = sum(64 * flops_per_token(SHAPE, "pass", steps).model for steps in drawn)
    whole, resumed = Work(random, SHAPE), Work(random, SHAPE)
    for number, steps in enumerate(drawn):
        worked(whole, 4, ponder=steps)
        if number == 17:
            resumed.restore(json.loads(json.dumps(whole.state())))
        elif number > 17:
            worked(resumed, 4, ponder=steps)
    assert whole.flops == pytest.approx(expected) and resumed.state() == whole.state()
    assert sum(whole.by_pondering_steps.values()) == 40


def test_rates_follow_the_tokens_of_a_ramp(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    ramp = config("train.batch_ramp_from=1", "train.batch_ramp_steps=7")  # 1 1 2 2 3 3 4 4 ...
    work = Work(ramp, SHAPE)
    throughput = Throughput(ramp, work, peak=None)
    worked(work, 1, 1)
    throughput.restart(data_wait=0.0)
    clock.now += 5.0
    worked(work, 2, 2, 3)
    found = throughput.since_last(5, data_wait=0.0)
    assert found["global_batch"] == 3 and found["tokens"] == 9 * 16 and found["tokens_per_second"] == 7 * 16 / 5.0
    assert found["seconds_per_step"] == pytest.approx(5.0 / 3)
    assert found["seconds_left"] == pytest.approx(5.0 / 7 * (3 + 94 * 4)) and found["mfu"] is None
    assert found["flops"] == pytest.approx(9 * 16 * flops_per_token(SHAPE, "pass").model)


def test_a_tally_is_the_mean_over_batches_by_their_weight() -> None:
    def output(loss: float, **more: Any) -> Any:
        values = {"pass_losses": torch.tensor([loss, 2 * loss]), "pass_entropies": torch.tensor([1.0, 1.0])}
        names = ("z_loss", "pass_shares", "halting_loss", "multi_token_losses", "changes")
        return SimpleNamespace(**(dict.fromkeys(names) | values | more))

    tally = StepTally()
    tally.add(output(1.0, z_loss=torch.tensor(0.5)), 1.0)
    tally.add(output(4.0, z_loss=torch.tensor(0.0)), 3.0)
    found = tally.means(tally.sums() * 2)  # as two ranks with the same numbers add up
    assert found.by_name == {"pass_losses": [3.25, 6.5], "pass_entropies": [1.0, 1.0], "z_loss": [0.125]}
    assert (found.loss, found.labels) == (6.5, 8)


def two_attempts(run_dir: Path, **log: str) -> None:
    """Steps 1 to 6, a crash, and steps 4 to 9."""
    attempts_of(run_dir, [(1, 1, 6), (2, 4, 9)], **log)


def attempts_of(
    run_dir: Path,
    attempts: list[tuple[int, int, int]],
    evaluations: Mapping[int, list[int]] = {},
    **log: str,
) -> None:
    """Attempts with their first and last steps, each but the last ended by a crash, and the steps that each evaluates.

    One at the step that an attempt goes on from is what the attempt before had no time for.
    """
    settings = config(f"run_dir={run_dir}", *(f"log.{key}={value}" for key, value in log.items()))
    for attempt, first, last in attempts:
        work, due = Work(settings, SHAPE), evaluations.get(attempt, [])
        options = {"start_step": first - 1, "attempt": attempt, "work": work, "vocabulary": 50}
        metrics = Metrics(settings, run_dir, active=True, peak=None, **options)
        for step in range(first - 1, last + 1):
            if step >= first:
                worked(work, 4)
                values = {"pass_losses": [3.0, float(step)], "pass_entropies": [1.0, 1.0], "pass_kls": [0.1]}
                metrics.log_step(step, StepMeans(values, 64), grad_norm=1.0, lr=1e-3, data_wait=0.0)
            if step in due:
                metrics.log_evaluation(step, {"any": HeldOut([3.0, step + 0.5], 17, 40)})
                metrics.log_tasks(step, {"choice": {"acc,none": step / 8}}, None, 2.0)
        if attempt == len(attempts):
            metrics.log_event("end", last, reason="done")
            metrics.close()
        else:
            for tracker in metrics._trackers:  # a crash, but for what their own processes would still write
                tracker.close()


def test_tensorboard_shows_each_step_once_after_a_death_before_the_first_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    attempts_of(tmp_path, [(1, 1, 6), (2, 1, 4)], tensorboard="true")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [point.step for point in board.Scalars("loss")] == [1, 2, 3, 4]


def test_trackers_get_the_evaluation_that_a_resume_makes_up_for_and_each_number_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 4 with a save and no time for its evaluation; the next attempt begins with it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    evaluations = {1: [2], 2: [4, 6], 3: [6]}
    attempts_of(tmp_path, [(1, 1, 4), (2, 5, 6), (3, 5, 7)], evaluations, wandb="offline", tensorboard="true")
    rows = [items for file in wandb_files(tmp_path) for items in history(file)]
    held_out = [(int(items["evaluation_step"]), float(items["losses/1"])) for items in rows if "losses/1" in items]
    assert held_out == [(2, 2.5), (4, 4.5), (6, 6.5)]
    tasks = [float(items["tasks/choice/acc,none"]) for items in rows if "tasks/choice/acc,none" in items]
    assert tasks == [0.25, 0.5, 0.75] and any("bits_per_byte/1" in items for items in rows)
    assert [(int(items["_step"]), float(items["loss"])) for items in rows if "loss" in items] == [
        (step, step) for step in range(1, 8)
    ]
    tokens = [float(items["tokens"]) for items in rows if "tokens" in items]
    assert tokens == [64.0 * step for step in (1, 2, 3, 4, 1, 2, 3)]  # of this test's work, not of what is held out
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    for name in ("losses/1", "bits_per_byte/1", "held_out_bytes", "tasks/choice/acc,none"):
        assert [point.step for point in board.Scalars(name)] == [2, 4, 6]
    assert [point.step for point in board.Scalars("tokens")] == [1, 2, 3, 4, 5, 6, 7]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_attempts(tmp_path, tensorboard="true")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(point.step, point.value) for point in board.Scalars("loss")] == [(step, step) for step in range(1, 10)]
    assert "pass_losses/0" in board.Tags()["scalars"]


def records_of_wandb(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, data = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of its pieces
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record
            data = b""


def wandb_files(run_dir: Path) -> list[Path]:
    """Of each attempt, in their order."""
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def history(file: Path) -> Iterator[dict[str, str]]:
    for record in records_of_wandb(file):
        yield {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}


def test_weights_and_biases_is_one_run_over_attempts_and_gets_each_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    two_attempts(tmp_path, wandb="offline")
    files = wandb_files(tmp_path)
    assert len(files) == 2
    seen = []
    for file in files:
        assert file.stem == "run-" + (tmp_path / "wandb_id").read_text().strip()
        seen += [(int(items["_step"]), float(items["loss"])) for items in history(file) if "loss" in items]
    assert seen == [(step, step) for step in range(1, 10)]
    assert [line["step"] for line in read(tmp_path / METRICS) if line["event"] == "step"] == list(range(1, 10))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"0123456789abcdef0123" not in written and "0123456789abcdef0123" not in "".join(capfd.readouterr())
