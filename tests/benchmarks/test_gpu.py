"""`make gpu` without a GPU: every stage at toy size, and what becomes of stages that fail, hang or come too late."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, stages
from benchmarks.__main__ import main
from benchmarks.gpu import Stage, measure
from benchmarks.rows import Place, Row, seconds, tried
from ponder_scale.errors import ConfigError
from tests.ranks import PLAIN, REPOSITORY

HERE = Place("cpu", toy=True)


def good(place: Place) -> Iterator[Row]:
    for number in range(2):
        yield Row(f"number {number}", f"{number} | {number}", "", {"number": number})


def raising(place: Place) -> Iterator[Row]:
    yield Row("before", "1")
    raise RuntimeError("the device\nis gone")


def partly(place: Place) -> Iterator[Row]:
    def wrong() -> Row:
        raise ValueError("one shape")

    def large() -> Row:
        raise torch.OutOfMemoryError("no more")

    yield tried("one", wrong)
    yield tried("another", large)
    yield Row("the last", "3")


def warned(place: Place) -> Iterator[Row]:
    logging.getLogger("ponder_scale.train").warning("a version that was not tested")
    yield Row("before", "1")
    logging.getLogger("ponder_scale.model.tiles").warning("kernel %s did not start", "mix")
    yield Row("after", "2")


def dying(place: Place) -> Iterator[Row]:
    yield Row("before", "1")
    os._exit(9)


def hanging(place: Place) -> Iterator[Row]:
    child = subprocess.Popen(["sleep", "600"])
    yield Row("child", str(child.pid))
    time.sleep(600)


def slow(place: Place) -> Iterator[Row]:
    for number in range(10_000):
        time.sleep(0.05)
        yield Row(str(number), "")


def missing(place: Place) -> Iterator[Row]:
    yield from ()
    raise ConfigError("it needs what is not installed here")


def named(function: Any, seconds: float = 60.0) -> Stage:
    return Stage(function.__name__, function.__name__, seconds, function)


@pytest.mark.timeout(900)
def test_every_stage_runs_at_toy_size(tmp_path: Path) -> None:
    """By the command, but for the minutes, which are of no account here."""
    command = [sys.executable, "-m", "benchmarks", "gpu", "--toy", "--out", str(tmp_path), "--minutes", "120"]
    environment = {**os.environ, **PLAIN}
    done = subprocess.run(
        [*command, "--train", "0.02"], capture_output=True, text=True, cwd=REPOSITORY, env=environment
    )
    log = (tmp_path / "gpu.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]
    found = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {outcome["name"]: outcome for outcome in found["stages"]}
    assert list(outcomes) == [*(name for name, *_ in stages.ALL), "train"]
    left_out = {name: outcome["reason"] for name, outcome in outcomes.items() if outcome["status"] != "done"}
    assert left_out == {"liger": "train.kernels is liger, whose kernels need CUDA; use torch"}
    rows = {name: [row["what"] for row in outcome["rows"]] for name, outcome in outcomes.items()}
    assert [name.partition(":")[0] for name in rows["op"]] == [
        "published",
        "chunked",
        "chunked+",
        "sdpa",
        "sdpa+",
        "top_k",
    ]
    assert [name.partition(",")[0] for name in rows["step"]] == [
        *("pass", "selective", "layer", "pass+layer", "none", "published")
    ]
    assert [name.partition(",")[0] for name in rows["decode"]] == ["whole prefix", "cached", "S = 0 cached"]
    assert any(name.startswith("compiled, after") for name in rows["decode-compiled"])
    assert any("skipped" in row["figure"] for row in outcomes["tests"]["rows"])
    table = (tmp_path / "gpu.md").read_text().splitlines()
    assert len(table) == 2 + sum(map(len, rows.values())) + 1  # one for what was left out
    assert {line.count("|") for line in table} == {5}


def test_a_stage_that_fails_hangs_or_dies_leaves_the_others_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1.0)
    given = [named(raising), named(partly), named(dying), named(hanging, 4.0), named(missing), named(good)]
    outcomes = {outcome.name: outcome for outcome in measure(given, HERE, tmp_path, 600)}
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        **dict.fromkeys(("raising", "partly", "dying", "hanging"), "failed"),
        "missing": "left out",
        "good": "done",
    }
    assert outcomes["raising"].reason == "RuntimeError: the device is gone"
    assert outcomes["partly"].reason == "one"
    assert [row["figure"] for row in outcomes["partly"].rows] == ["failed", "out of memory", "3"]
    assert outcomes["dying"].reason == "its process ended with exit code 9"
    assert [len(outcomes[name].rows) for name in ("raising", "dying", "good")] == [1, 1, 2]
    child = Path("/proc", outcomes["hanging"].rows[0]["figure"], "stat")
    assert not child.exists() or child.read_text().split()[2] == "Z"  # nothing that it started goes on
    assert "RuntimeError: the device" in (tmp_path / "gpu.log").read_text()
    table = (tmp_path / "gpu.md").read_text()
    assert "| missing | *left out* | it needs what is not installed here |  |" in table
    assert "| good | number 1 | 1 / 1 |  |" in table
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"][-1]["rows"][1]["values"] == {"number": 1}


def test_kernels_that_fall_back_to_another_backend_are_a_failure(tmp_path: Path) -> None:
    """Their numbers would be those of what took their place. Other warnings are told, and no more."""
    (outcome,) = measure([named(warned)], HERE, tmp_path, 600)
    assert (outcome.status, outcome.reason) == ("failed", "kernel mix did not start")
    assert [(row["what"], row["figure"]) for row in outcome.rows] == [
        ("before", "1"),
        ("warning", "a version that was not tested"),
        ("after", "2"),
        ("warning", "kernel mix did not start"),
    ]


def test_a_budget_that_runs_out_skips_the_rest_and_says_so(tmp_path: Path) -> None:
    outcomes = measure([named(slow, 1.0), named(good)], HERE, tmp_path, 1.5)
    assert [outcome.status for outcome in outcomes] == ["cut short", "skipped"]
    assert outcomes[0].rows and outcomes[0].reason == "it reached its limit of 1 s"
    assert "raise --minutes" in outcomes[1].reason
    assert "| good | *skipped* | the 0.025 minutes were over; raise --minutes |  |" in (tmp_path / "gpu.md").read_text()


def test_the_exit_code_says_whether_a_stage_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, code in (([named(good), named(missing)], 0), ([named(raising), named(good)], 1)):
        monkeypatch.setattr(gpu, "_stages", lambda place, given=given: given)
        assert main(["gpu", "--toy", "--out", str(tmp_path)]) == code
        assert ("; failed: raising" in capsys.readouterr().out) == bool(code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU is told")
def test_a_machine_without_a_gpu_is_told_so_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "--silent", "gpu", f"FLAGS=--out {tmp_path / 'out'}", f"BIN={Path(sys.executable).parent}"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    said, *rest = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    assert said.startswith("error: torch finds no GPU to measure") and "--toy" in said
    assert len(rest) == 1 and rest[0].startswith("make")  # its own, that the target failed


def test_what_is_measured_on_a_gpu_is_the_recipe_of_1_4b() -> None:
    work = stages._work(Place("cuda"), 4)
    assert work.shape.parameters == 1_420_396_544
    assert work.line() == "llama D 2048, L 24, V 50304, 4 x 2048 tokens, bfloat16"
    assert work.model.pondering_steps == stages.STEPS


def test_a_short_call_is_timed_over_many() -> None:
    calls = []
    assert 0 < seconds(lambda: calls.append(1), "cpu", least=0.01) < 1e-3
    assert len(calls) > 100
