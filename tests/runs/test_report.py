"""`ponder-scale report`: what of a record reaches the page, and the page in a browser."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ponder_scale.errors import ConfigError
from ponder_scale.runs.records import Recorder
from ponder_scale.runs.report import names, report
from ponder_scale.runs.series import POINTS, read_run, thin


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


BROWSER = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


def browse(page: Path, *more: str, anchor: str = "") -> str:
    """What chromium prints of a page."""
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    words += [f"--user-data-dir={page.parent / 'profile'}", *more, page.as_uri() + anchor]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


def figures(dom: str) -> dict[str, str]:
    """What is in each chart, by its title."""
    return dict(re.findall(r'<figure data-chart="([^"]+)">(.*?)</figure>', dom, re.DOTALL))


def make_random_run(run_dir: Path, drawn: list[int]) -> Path:
    """A run whose steps took these numbers of pondering steps."""
    run_dir.mkdir(parents=True)
    record = Recorder(run_dir, start_step=0, attempt=1)
    for step, pondering in enumerate(drawn, 1):
        values = step_values(step, pondering + 1)
        norms = {"embed_norms": values["pass_losses"], "embed_cosines": values["pass_kls"]}
        loss = None if step == 5 else values["loss"]  # it was not finite
        record.write("step", step, **{**values, **norms, "loss": loss, "memory_gib": 0.03, "seconds_per_step": 0.1})
    return run_dir


@BROWSER
def test_curves_of_passes_that_are_not_always_run_are_whole_and_single_points_are_drawn(tmp_path: Path) -> None:
    run_dir = make_random_run(tmp_path / "random", [2, 0, 3, 0, 2, 0, 1, 0, 3, 1, 2, 0])
    drawn = figures(browse(report([run_dir], tmp_path / "report.html"), "--dump-dom"))
    for title, count in (
        ("Loss by pass", 4),
        ("KL from each pass to the next", 3),
        ("Norm of the inputs of the passes", 4),
        ("Cosine of the inputs of successive passes", 3),
    ):
        paths = re.findall(r'<path d="([^"]*)"', drawn[title])
        assert len(paths) == count and all(path.count("M") == 1 and "L" in path for path in paths), (title, paths)
    (loss,) = re.findall(r'<path d="([^"]*)"', drawn["Loss"])
    assert loss.count("M") == 2  # a loss that was not finite is a gap
    once = make_random_run(tmp_path / "once", [2])
    tasks = {
        "a": {"acc,none": 0.5, "acc_stderr,none": 0.1},
        "b": {"exact_match,none": 1.0, "word_perplexity,none": 9.0},
    }
    Recorder(once, start_step=1, attempt=2).write("tasks", 1, tasks=tasks, failure=None, seconds=1.0)
    page = report([once], tmp_path / "once.html")
    drawn = figures(browse(page, "--dump-dom"))
    assert drawn["Tasks"].count("<circle") == 2 and "b exact_match" in drawn["Tasks"]
    assert drawn["Tasks, other metrics"].count("<circle") == 1 and "b word_perplexity" in drawn["Tasks, other metrics"]
    assert drawn["Loss"].count("<circle") == 1 and drawn["Loss by pass"].count("<circle") == 3
    alone = make_random_run(tmp_path / "alone", [0, 0, 0, 0, 0, 1, 0, 0])  # one point in a curve of eight
    drawn = figures(browse(report([alone], tmp_path / "alone.html"), "--dump-dom"))
    assert drawn["KL from each pass to the next"].count("<circle") == 1


@BROWSER
def test_the_report_fits_a_narrow_screen_with_round_ticks_in_units_that_fit(pair: list[Path], tmp_path: Path) -> None:
    long = make_run(tmp_path / ("a-run-with-a-name-that-is-wider-than-a-telephone" * 2), 4, 300)
    small = make_random_run(tmp_path / "small", [3] * 7)
    for runs, axis in (([*pair, long], "tokens"), ([small], "hours"), ([small], "step"), ([long], "flops")):
        page = report(runs, tmp_path / "report.html")
        dom = browse(in_a_frame(page, 400, f"$('axis').value = '{axis}'; draw();"), "--dump-dom")
        found = re.search(r'data-wide="(\d+) (\d+)"', dom)
        assert found is not None and int(found[1]) <= int(found[2]) == 400, found
        names = re.findall(r'class="(?:across|down)">([^<]+)<', dom)
        assert len(names) > 50
        for name in names:
            digits = re.sub(r"e-?\d+|[TBMk.-]", "", name).strip("0")
            assert digits == "" or len(digits) <= 3, name
        for title, inside in figures(dom).items():
            for way in ("across", "down"):
                values = [number(text) for text in re.findall(rf'class="{way}">([^<]+)<', inside)]
                steps = {float(f"{after - before:.6g}") for before, after in itertools.pairwise(values)}
                assert len(set(values)) == len(values) and len(steps) <= 1, (title, way, values)
                assert all(re.match(r"[125]\.000000e", f"{step:e}") for step in steps), (title, way, values)
        if runs == [small]:
            assert "<span>MiB on rank 0: now, peak</span>" in dom and ">30.7 MiB<" in dom
            assert axis != "hours" or ">seconds</text>" in dom
            along = re.findall(r'class="across">([^<]+)<', figures(dom)["Loss"])
            assert axis != "step" or along == ["0", "2", "4", "6"]


def in_a_frame(page: Path, width: int, script: str) -> Path:
    """A page that shows another so wide, narrower than a window can be, and takes over what a script makes of it."""
    script += "document.body.dataset.wide = `${document.documentElement.scrollWidth} ${innerWidth}`;"
    script += "parent.document.getElementById('taken').innerHTML = document.body.outerHTML.replace('<body', '<main')"
    inner = escape(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    frame = page.with_name("frame.html")
    style = f"border: 0; width: {width}px; height: 900px"
    frame.write_text(f'<meta charset="utf-8"><iframe style="{style}" srcdoc="{inner}"></iframe><div id="taken"></div>')
    return frame


def number(name: str) -> float:
    """What a tick stands for."""
    letter = name[-1] if name[-1] in "TBMk" else ""
    return float(name.removesuffix(letter)) * {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3, "": 1.0}[letter]


@BROWSER
def test_the_report_is_drawn_by_a_browser(pair: list[Path], tmp_path: Path) -> None:
    page, picture = report(pair, tmp_path / "report.html"), tmp_path / "report.png"
    text = page.read_text()
    assert not re.search(r"(src|href|url)\s*[=(]|@import|fetch\(|XMLHttp", text)  # nothing is fetched
    assert text.count("</script>") == 1  # though a setting holds one
    assert len(text) < 600_000
    dom = browse(page, "--dump-dom", anchor="#axis=flops&theme=dark")
    assert 'data-drawn="flops"' in dom and 'data-theme="dark"' in dom
    drawn = figures(dom)
    curves = {title: len(re.findall('class="curve"', inside)) for title, inside in drawn.items()}
    expected = {"Loss": 2, "Loss by pass": 5, "Held-out loss by pass": 5, "Held-out loss by source": 4}
    expected |= {"Entropy by pass": 5, "KL from each pass to the next": 3, "Gradient norm": 2, "Speed": 2}
    assert expected.items() <= curves.items()
    assert curves["Utilization"] == 1  # the other run has none
    kinds = set(re.findall(r'data-event="(\w+)"', drawn["Loss"]))
    assert kinds == {"save", "resume", "skip", "alarm", "end"}
    differs = re.search(r'<table id="config">(.*?)</table>', dom, re.DOTALL)
    assert differs is not None and "pondering_steps" in differs[1] and "seed" not in differs[1]
    # the two runs take different FLOPs a step: equal on steps, apart on FLOPs
    ends = [re.findall(r"[\d.]+", path)[-2] for path in re.findall(r'<path d="([^"]+)"', drawn["Loss"])]
    assert len(set(ends)) == 2
    browse(page, "--window-size=1400,1600", f"--screenshot={picture}")
    assert picture.stat().st_size > 50_000
    assert json.loads(re.search(r"const runs = (.*);\n", text)[1])[1]["name"] == "vanilla"  # type: ignore[index]
