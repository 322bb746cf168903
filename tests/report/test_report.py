"""`ponder-scale report`: what of a record reaches the page, and the page in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ponder_scale.errors import ConfigError
from ponder_scale.records import Recorder
from ponder_scale.report.page import names, report
from ponder_scale.report.series import POINTS, read_run, thin


def step_values(step: int, passes: int) -> dict[str, Any]:
    losses = [3.0 + 1.0 / step + 0.1 * (passes - index) for index in range(passes)]
    return {
        "time": 1e9 + 2.0 * step,
        "tokens": 1000 * step,
        "flops": 1e19 * step * passes,  # beyond 64-bit integers
        "loss": losses[-1],
        "pass_losses": losses,
        "pass_entropies": losses,
        "pass_kls": [0.3 / (index + 1) for index in range(passes - 1)],
        "grad_norm": 50.0 if step == 333 else 1.0,
        "lr": 1e-3,
        "seconds_per_step": 2.0,
        "tokens_per_second": 500.0,
        "mfu": 0.4 if passes > 1 else None,
        "memory_gib": 2.0,
    }


def make_run(run_dir: Path, passes: int, steps: int) -> Path:
    """Two attempts: the first dies at the middle, the second goes on from a third."""
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(f"seed: 1\nmodel: {{pondering_steps: {passes - 1}, name: '</script>'}}\n")
    first = Recorder(run_dir, start_step=0, attempt=1)
    for step in range(1, steps // 2):
        first.write("step", step, **step_values(step, passes))
    first.write("skip", steps // 2 - 1, reason="gradient norm")
    second = Recorder(run_dir, start_step=steps // 3, attempt=2)
    second.write("resume", steps // 3)
    for step in range(steps // 3 + 1, steps + 1):
        second.write("step", step, **step_values(step, passes))
        if step % 100 == 0:
            second.write("save", step, checkpoint=f"step-{step:08d}")
            sources = {name: {"losses": [2.0] * passes, "tokens": 9} for name in ("code", "web")}
            second.write("evaluation", step, losses=[2.5] * passes, tokens=18, sources=sources)
    second.write("alarm", steps, kind="pondering_idle")
    second.write("end", steps, reason="done")
    return run_dir


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "pondering", 4, 2000), make_run(folder / "vanilla", 1, 1200)]


def test_a_run_is_read_once_whatever_number_of_attempts_it_took(pair: list[Path]) -> None:
    run = read_run(pair[0], "a")
    assert run["x"]["step"] == sorted(set(run["x"]["step"])) and run["x"]["step"][-1] == 2000
    assert run["x"]["flops"][-1] == pytest.approx(8e22)
    assert run["x"]["hours"][-1] == pytest.approx(4000 / 3600, rel=1e-4)
    assert run["summary"]["attempts"] == 2 and run["summary"]["alarm"] == 1 and run["summary"]["ended"] == "done"
    assert [event["event"] for event in run["events"]][:2] == ["skip", "resume"]
    assert run["config"] == {"seed": "1", "model.pondering_steps": "3", "model.name": "</script>"}
    assert math.isclose(run["series"]["pass_losses/0"][-1], 3.4, rel_tol=1e-2)


def test_a_spike_of_one_step_survives_the_thinning(pair: list[Path]) -> None:
    run = read_run(pair[0], "a")
    assert len(run["x"]["step"]) <= POINTS
    assert max(run["high"]["grad_norm"]) == 50.0 and max(run["series"]["grad_norm"]) < 50.0


def test_thinning_keeps_means_extremes_and_gaps() -> None:
    values = np.array([1.0, 3.0, np.nan, np.nan, 5.0])
    x, series, low, high = thin({"step": np.arange(1.0, 6.0), "loss": values}, 3)
    assert x["step"] == [2, 4, 5]
    assert series["loss"] == [2, None, 5] and low["loss"] == [1, None, 5] and high["loss"] == [3, None, 5]


def test_a_million_logged_steps_make_a_small_page() -> None:
    columns = {"step": np.arange(1.0, 1e6 + 1), "loss": np.random.default_rng(0).normal(size=1_000_000)}
    x, series, low, _ = thin(columns, POINTS)
    assert len(x["step"]) == len(series["loss"]) == len(low["loss"]) == POINTS
    assert series["loss"][0] == pytest.approx(columns["loss"][:1250].mean(), rel=1e-4)


def test_runs_are_named_by_as_much_of_their_path_as_tells_them_apart() -> None:
    assert names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert names([Path("/a/x/run"), Path("/a/y/run")]) == ["x/run", "y/run"]
    with pytest.raises(ConfigError, match="a run is named twice"):
        names([Path("/a/x"), Path("/a/x")])


def test_what_cannot_be_reported_is_answered(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl in it; expected the run_dir of a run"):
        report([tmp_path], tmp_path / "out.html")
    Recorder(tmp_path, start_step=0, attempt=1).write("save", 1)
    with pytest.raises(ConfigError, match="no step is recorded in it yet"):
        report([tmp_path], tmp_path / "out.html")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_report_is_drawn_by_a_browser(pair: list[Path], tmp_path: Path) -> None:
    page, picture = report(pair, tmp_path / "report.html"), tmp_path / "report.png"
    text = page.read_text()
    assert not re.search(r"(src|href|url)\s*[=(]|@import|fetch\(|XMLHttp", text)  # nothing is fetched
    assert text.count("</script>") == 1  # though a setting holds one
    assert len(text) < 600_000
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]

    def run(*more: str) -> str:
        done = subprocess.run([*browser, *more], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-1000:]
        return done.stdout

    dom = run("--dump-dom", f"{page.as_uri()}#axis=flops&theme=dark")
    assert 'data-drawn="flops"' in dom and 'data-theme="dark"' in dom
    figures = dict(re.findall(r'<figure data-chart="([^"]+)">(.*?)</figure>', dom, re.DOTALL))
    curves = {title: len(re.findall('class="curve"', inside)) for title, inside in figures.items()}
    expected = {"Loss": 2, "Loss by pass": 5, "Held-out loss by pass": 5, "Held-out loss by source": 4}
    expected |= {"Entropy by pass": 5, "KL from each pass to the next": 3, "Gradient norm": 2, "Speed": 2}
    assert expected.items() <= curves.items()
    assert curves["Utilization"] == 1  # the other run has none
    kinds = set(re.findall(r'data-event="(\w+)"', figures["Loss"]))
    assert kinds == {"save", "resume", "skip", "alarm", "end"}
    differs = re.search(r'<table id="config">(.*?)</table>', dom, re.DOTALL)
    assert differs is not None and "pondering_steps" in differs[1] and "seed" not in differs[1]
    # the two runs take different FLOPs a step: equal on steps, apart on FLOPs
    ends = [re.findall(r"[\d.]+", path)[-2] for path in re.findall(r'<path d="([^"]+)"', figures["Loss"])]
    assert len(set(ends)) == 2
    run("--window-size=1400,1600", f"--screenshot={picture}", page.as_uri())
    assert picture.stat().st_size > 50_000
    assert json.loads(re.search(r"const runs = (.*);\n", text)[1])[1]["name"] == "vanilla"  # type: ignore[index]
