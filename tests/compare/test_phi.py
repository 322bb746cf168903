"""phi, the worth of a pass in parameters: planted losses give it back, and a grid that cannot tell it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ponder_scale.checkpoint.index import step_folder
from ponder_scale.cli import _parser
from ponder_scale.compare.phi import Point, fit
from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.settings import load, to_yaml
from ponder_scale.settings.commandline import parse
from ponder_scale.setup.build import model_configuration, new_model

E, A, ALPHA, B, BETA = 1.69, 406.4, 0.34, 410.7, 0.28  # Chinchilla's law (arXiv 2203.15556), that of its approach 3


def planted(
    phi: float,
    noise: float,
    *,
    widths: tuple[int, ...] = (128, 256, 512),
    steps: tuple[int, ...] = (0, 1, 3),
    tokens_each: tuple[int, ...] = (5, 20, 80),
    seed: int = 0,
) -> list[Point]:
    """Runs whose losses follow the law, each with an error of its own."""
    generator, points = np.random.default_rng(seed), []
    for width in widths:
        once, recurrent = 8192.0 * width, 12.0 * 6 * width**2
        for passes in (number + 1 for number in steps):
            for each in tokens_each:
                tokens = each * (once + recurrent)
                loss = E + A * (once + passes**phi * recurrent) ** -ALPHA + B * tokens**-BETA
                points.append(Point(once, recurrent, passes, tokens, loss * np.exp(noise * generator.normal())))
    return points


@pytest.mark.parametrize("phi", [0.0, 0.46, 1.0])
def test_planted_losses_give_back_their_phi(phi: float) -> None:
    exact = fit(planted(phi, 0.0), resamples=2)
    law = (exact.phi, exact.e, exact.a, exact.alpha, exact.b, exact.beta)
    assert law == pytest.approx((phi, E, A, ALPHA, B, BETA), rel=1e-3, abs=1e-3)
    found = fit(planted(phi, 0.002), resamples=40)
    assert abs(found.phi - phi) < 0.05
    assert found.low - 0.02 < phi < found.high + 0.02 and found.high - found.low < 0.2
    assert found.worth(1.0, 10.0, 4) == pytest.approx(1 + 4**found.phi * 10)


def test_one_wild_run_does_not_carry_the_fit_away() -> None:
    points = planted(0.46, 0.001)
    points[4] = points[4]._replace(loss=1.3 * points[4].loss)
    assert abs(fit(points, resamples=2).phi - 0.46) < 0.05


def test_the_same_runs_give_the_same_interval() -> None:
    points = planted(0.46, 0.004)
    assert fit(points, resamples=5) == fit(points, resamples=5)


def test_runs_of_equal_tokens_leave_the_part_of_tokens_to_the_floor() -> None:
    def equal(point: Point) -> Point:
        return point._replace(tokens=1e9, loss=point.loss - B * point.tokens**-BETA + B * 1e9**-BETA)

    found = fit([equal(point) for point in planted(0.46, 0.0, steps=(0, 1, 3, 7), tokens_each=(20,))], resamples=2)
    assert (found.b, found.beta) == (None, None)
    assert found.phi == pytest.approx(0.46, abs=1e-3) and found.e == pytest.approx(E + B * 1e9**-BETA, rel=1e-3)


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (planted(0.46, 0.0, steps=(3,)), "all 9 runs have S = 3, so they do not show what a pass is worth"),
        (planted(0.46, 0.0, widths=(128,)), r"all 9 runs have 2,228,224 parameters, .* another width or depth"),
        (
            planted(0.46, 0.0, widths=(128, 256), steps=(0, 3), tokens_each=(20,)),
            "4 different runs cannot determine the 6",
        ),
        (
            2 * planted(0.46, 0.0, widths=(128, 256), steps=(0, 3), tokens_each=(20,)),
            "4 different runs cannot determine",
        ),
        ([point._replace(loss=3.0) for point in planted(0.46, 0.0)], "phi is from|fit as well with another phi"),
        (planted(0.46, 0.3, tokens_each=(20,)), "phi is from|fit as well with another phi"),
        ([*planted(0.46, 0.0), Point(1.0, 1.0, 1, 1.0, float("nan"))], "but a run has none"),
        ([], "there are no runs"),
    ],
    ids=["one S", "one size", "too few", "repeated", "no difference", "noise", "not finite", "none"],
)
def test_a_grid_that_cannot_tell_phi_is_refused_in_one_line(points: list[Point], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as refused:
        fit(points, resamples=40)
    assert "\n" not in str(refused.value)


SHAPE = ["model.num_attention_heads=4", "data.sources.x.path=unused", "data.seq_len=32", "train.global_batch=4"]


def write_run(folder: Path, width: int, passes: int, steps: int, *more: str) -> Point:
    """The files of a finished run with a planted loss."""
    settings = [
        f"model.hidden_size={width}",
        f"model.intermediate_size={2 * width}",
        f"model.pondering_steps={passes - 1}",
    ]
    config = load(RunConfig, None, [*SHAPE, *settings, f"run_dir={folder}", f"train.steps={steps}", *more])
    model = model_configuration(config.model, vocab_size=300, seq_len=32, eod_id=0)
    made = new_model(model)
    once = sum(
        weight.numel() for name, weight in made.named_parameters() if "embed_tokens" in name or "lm_head" in name
    )
    recurrent, tokens = sum(weight.numel() for weight in made.parameters()) - once, steps * 4 * 32
    loss = E + A * (once + passes**0.46 * recurrent) ** -ALPHA + B * tokens**-BETA
    checkpoint = step_folder(folder, steps)
    checkpoint.mkdir(parents=True)
    state = {"model": model.to_dict(), "loader": {"shards": "a" * 32}}
    (checkpoint / "state.json").write_text(json.dumps(state))
    (folder / "config.yaml").write_text(to_yaml(config))
    record = {"event": "evaluation", "step": steps, "losses": [9.0] * (passes - 1) + [loss], "tokens": 64}
    record |= {"trained_tokens": tokens, "sources": {}}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return Point(once, recurrent, passes, tokens, loss)


def command(*words: Any) -> None:
    options = parse(_parser(), ["phi", *map(str, words)], RunConfig, "overrides")
    options.run(options, [])


def test_the_command_finds_finished_runs_at_any_depth_and_says_what_a_pass_is_worth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [
        write_run(tmp_path / f"runs/width-{width}/S-{passes}/{steps}", width, passes, steps)
        for width in (16, 32, 64)
        for passes in (1, 2, 4)
        for steps in (100, 400)
    ]
    unfinished = tmp_path / "runs/unfinished"
    write_run(unfinished, 16, 2, 50)
    (unfinished / "config.yaml").write_text((unfinished / "config.yaml").read_text().replace("steps: 50", "steps: 60"))
    command(tmp_path / "runs", "--json", tmp_path / "phi.json")
    printed = capsys.readouterr().out
    assert "llama, feedback embedding, residual accumulate: phi = 0.460, 95% from 0.4" in printed
    assert "over 18 runs" in printed and "4 passes of" in printed
    content = json.loads((tmp_path / "phi.json").read_text())
    (found,) = content["fits"].values()
    assert found["phi"] == pytest.approx(0.46, abs=1e-3) and len(content["runs"]) == 18
    read = [Point(*(run[field] for field in Point._fields)) for run in content["runs"]]
    assert sorted(read) == sorted(points)
    with pytest.raises(ConfigError, match=r"all 6 runs have S = 0|none of the runs ponders"):
        command(*(tmp_path / f"runs/width-{width}/S-1" for width in (16, 32, 64)))
    with pytest.raises(ConfigError, match="expected finished runs"):
        command(unfinished)
    state = tmp_path / "runs/width-16/S-1/100/checkpoints/step-00000100/state.json"
    state.write_text(state.read_text().replace("a" * 32, "b" * 32))
    with pytest.raises(ConfigError, match="over other data than that of"):
        command(tmp_path / "runs")
