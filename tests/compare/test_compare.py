"""Comparisons: what is trained, what is claimed, a small one from end to end. Mechanics, no claim about pondering."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.cli import _parser
from ponder_scale.compare.answers import Answers
from ponder_scale.compare.answers import chart as answers_chart
from ponder_scale.compare.baselines import EXTRAS
from ponder_scale.compare.findings import Result, Verdict, half_width, read_result, time_ratio, verdicts
from ponder_scale.compare.grid import fit_runs
from ponder_scale.compare.members import Member, Run, plan_runs
from ponder_scale.compare.report import write_report
from ponder_scale.config import RunConfig, TrainConfig, load_recipe
from ponder_scale.errors import ConfigError
from ponder_scale.settings import load
from ponder_scale.settings.commandline import parse
from ponder_scale.setup.build import model_configuration
from tests.commands import run_command

VOCABULARY = 300
SHAPE = [
    *("model.hidden_size=48", "model.intermediate_size=128", "model.num_hidden_layers=3"),
    *("model.num_attention_heads=6", "model.num_key_value_heads=3", "model.pondering_steps=2"),
    *("data.seq_len=16", "data.sources.tiny.path=unused", "train.global_batch=4", "train.micro_batch=4"),
]
SETTINGS = [*SHAPE, "run_dir=runs/x", "train.steps=40"]


def configure(more: Any = ()) -> RunConfig:
    return load(RunConfig, None, [*SETTINGS, *more])


def test_models_are_compared_by_their_tokens_when_the_batch_rises() -> None:
    def ramped(more: Any = ()) -> RunConfig:
        return configure(["train.batch_ramp_from=1", "train.batch_ramp_steps=31", *more])

    runs = plan_runs(ramped, vocab_size=VOCABULARY, steps=[], seeds=[], extras=[])
    ours, vanilla, flops = (
        next(run.member for run in runs if run.member.name == name)
        for name in ("pondering-2", "vanilla", "vanilla-flops")
    )
    assert ours.tokens == vanilla.tokens == (10 * (1 + 2 + 3) + 10 * 4) * 16
    assert flops.flops == pytest.approx(ours.flops, rel=1 / 40)
    assert ours.share(20) == 30 / 100 and ours.share(40) == 1


def planned(**arguments: Any) -> dict[str, Run]:
    options = {"vocab_size": VOCABULARY, "steps": [], "seeds": [], "extras": [], **arguments}
    return {run.name: run for run in plan_runs(configure, **options)}


def test_the_baselines_are_equal_in_what_they_say() -> None:
    runs = planned(extras=list(EXTRAS), seeds=[1, 5])
    assert len(runs) == 2 * (4 + len(EXTRAS) - 1)  # vanilla-time waits for the times
    ours, vanilla, twice, flops = (
        runs[f"{name}/seed-1"].member for name in ("pondering-2", "vanilla", "vanilla-twice", "vanilla-flops")
    )
    assert ours.parameters == vanilla.parameters == flops.parameters == runs["looped/seed-1"].member.parameters
    assert ours.tokens == vanilla.tokens == twice.tokens == 40 * 4 * 16
    assert twice.parameters == pytest.approx(2 * ours.parameters, rel=0.04)
    assert flops.flops == pytest.approx(ours.flops, rel=1 / 40) and flops.tokens > 3 * ours.tokens
    for run in runs.values():
        config = configure(run.overrides)
        assert config.run_dir == f"runs/x/{run.name}" and config.seed == run.seed
        assert config.data == configure().data and config.optim == configure().optim
    looped = configure(runs["looped/seed-5"].overrides).model
    assert (looped.feedback, looped.residual, looped.pondering_steps) == ("hidden", "replace", 2)
    for name, steps in (("multi-token", 2), ("vanilla-multi-token", 0)):
        model = configure(runs[f"{name}/seed-1"].overrides).model
        assert (model.extra_heads, model.pondering_steps) == (2, steps)
        assert runs[f"{name}/seed-1"].member.parameters > ours.parameters
    assert configure(runs["vanilla-flops/seed-1"].overrides).model == configure(runs["vanilla/seed-1"].overrides).model


def test_latents_and_pauses_are_compared_even_with_a_recipe_that_they_refuse() -> None:
    """A recipe may have what only passes over the same positions have."""
    passes = ["model.residual=restart", "model.pondering_top_k=9", "train.pass_losses=uniform"]
    runs = planned(extras=["latent", "pause"])
    for name, scale in (("latent", math.sqrt(2.5)), ("pause", 1.0)):
        run = next(run for run in runs.values() if run.member.name == name)
        model = configure([*passes, *run.overrides]).model
        assert (model.feedback, model.residual, model.pondering_top_k) == (name, "accumulate", None)
        assert model.initial_scale == pytest.approx(scale) and run.member.pondering_steps == model.pondering_steps
    flops = {run.member.name: run.member.flops for run in runs.values()}
    assert flops["latent"] > flops["pondering-2"] > flops["pause"] > flops["vanilla"]


@pytest.mark.parametrize("recipe", ["pythia-70m", "llama-1.4b", "gpt2-124m", "quickstart"])
def test_twice_the_parameters_is_found_for_the_shipped_recipes(recipe: str) -> None:
    def of_recipe(more: Any = ()) -> RunConfig:
        return load_recipe(recipe, more)

    members = {
        run.member.name: run.member for run in plan_runs(of_recipe, vocab_size=2000, steps=[1], seeds=[], extras=[])
    }
    assert members["vanilla-twice"].parameters == pytest.approx(2 * members["vanilla"].parameters, rel=0.04)


def test_what_cannot_be_compared_is_answered() -> None:
    with pytest.raises(ConfigError, match="--steps has 0; expected at least 1; vanilla, with 0 steps"):
        planned(steps=[0, 1])
    with pytest.raises(ConfigError, match="--with paused: expected one of vanilla-time, vanilla-long, looped, hidden"):
        planned(extras=["paused"])


def result(name: str, seed: int, losses: list[float], finished: bool = True) -> Result:
    member = Member(name, "", (), 1, TrainConfig(10 * len(losses), 1), 1000 * len(losses), 1.0)
    curve = [(10 * (index + 1), loss) for index, loss in enumerate(losses)]
    return Result(Run(member, seed, Path("x")), curve, 1.0, 1, finished)


def test_a_difference_is_claimed_only_beyond_its_spread_over_seeds() -> None:
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))  # Student's t, two degrees of freedom
    ours = [result("pondering-1", seed, [4.0, 3.0 + seed / 100, 2.0 + seed / 100]) for seed in (1, 2, 3)]
    # the same seeds lie 0.1 apart, give or take 0.001: the spread between seeds must not hide that
    better = [result("vanilla", seed, [4.0, 3.1, 2.1 + seed / 100 + seed / 1000]) for seed in (1, 2, 3)]
    mixed = [result("looped", seed, [4.0, 3.0, 2.0 + (-1) ** seed / 50]) for seed in (1, 2, 3)]
    alone = [result("hidden", 2, [4.0, 3.0, 9.0]), result("hidden", 3, [4.0, 3.0, 9.0], finished=False)]
    found = {verdict.baseline: verdict for verdict in verdicts([*ours, *better, *mixed, *alone])}
    assert found["vanilla"].differences == pytest.approx([0.101, 0.102, 0.103])
    assert found["vanilla"].half_width == pytest.approx(4.303 * 0.001 / math.sqrt(3))
    text = str(found["vanilla"])
    assert "loss lower by +0.1020 nats +- 0.0025 (95% interval over 3 seeds): pondering-1 is better" in text
    assert "at every evaluation from 2,000 tokens on" in text
    assert str(found["looped"]).endswith("the interval holds 0, so no difference is claimed")
    assert str(found["hidden"]).endswith("in one seed, so no difference is claimed; train at least 3 seeds")
    worse = str(Verdict("a", "b", [-0.3, -0.32], 0.1, None))
    assert worse.endswith("b is better") and "a against b: loss higher by +0.3100 nats +- 0.1000" in worse
    assert "loss higher by +0.3100 nats in one seed" in str(Verdict("a", "b", [-0.31], None, None))


def test_a_run_that_diverged_is_reported_and_nothing_is_claimed_of_it(tmp_path: Path) -> None:
    record = {"event": "evaluation", "step": 8, "losses": [5.0, None], "tokens": 64}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    run = Run(Member("vanilla", "", (), 1, TrainConfig(8, 1), 800, 1.0), 1, tmp_path)
    found = read_result(run)
    assert found is not None and math.isnan(found.loss)
    results = [result("pondering-1", seed, [3.0, 2.0]) for seed in (1, 2)]
    results += [result("vanilla", 1, [900.0, 800.0]), result("vanilla", 2, [3.0, math.nan])]
    text = write_report(tmp_path, results, [])
    assert "no difference is claimed, as a held-out loss is not finite" in text and "| not finite |" in text
    members = json.loads((tmp_path / "compare.json").read_text(), parse_constant=pytest.fail)["members"]
    assert [one["loss"] for one in members[1]["runs"]] == [800.0, None]
    assert [one["perplexity"] for one in members[1]["runs"]] == [None, None]


def test_nothing_is_said_of_losses_where_nothing_is_held_out() -> None:
    assert verdicts([result(name, seed, []) for name in ("pondering-1", "vanilla") for seed in (1, 2)]) == []


def test_bits_per_byte_stand_beside_perplexity_where_every_seed_knows_them(tmp_path: Path) -> None:
    record = {"event": "evaluation", "step": 8, "losses": [5.0, 2.0], "tokens": 64, "bits_per_byte": [3.0, 1.25]}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    found = read_result(Run(Member("vanilla", "", (), 1, TrainConfig(8, 1), 800, 1.0), 1, tmp_path))
    assert found is not None and found.bits_per_byte == 1.25
    known = [replace(result("pondering-1", seed, [3.0, 2.0]), bits_per_byte=1.0 + seed / 8) for seed in (1, 3)]
    text = write_report(
        tmp_path, [*known, found, replace(found, run=replace(found.run, seed=2), bits_per_byte=None)], []
    )
    assert "| bits per byte | seeds |" in text and "| 7.39 | 1.2500 | 2 |" in text and "| 7.39 | - | 2 |" in text
    assert "all bits of these tokens over the bytes of their text" in text
    members = json.loads((tmp_path / "compare.json").read_text())["members"]
    assert [one["bits_per_byte"] for one in members[0]["runs"]] == [1.125, 1.375]


def test_a_result_is_what_the_record_says(tmp_path: Path) -> None:
    lines = [
        {"event": "step", "step": 5, "seconds_per_step": 2.0},
        {"event": "evaluation", "step": 5, "losses": [5.0, 4.0], "tokens": 64},
        {"event": "save", "step": 5},
        {"event": "step", "step": 8, "seconds_per_step": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = Run(Member("vanilla", "", (), 1, TrainConfig(8, 1), 800, 1.0), 1, tmp_path)
    found = read_result(run)
    assert found is not None
    assert (found.curve, found.seconds, found.held_out_tokens, found.finished) == ([(5, 4.0)], 13.0, 64, False)
    assert read_result(Run(run.member, 1, tmp_path / "absent")) is None
    assert (found.amount("tokens", 5), found.amount("flops", 5)) == (500, 0.625)  # of an older version: by its recipe


def test_a_run_whose_batch_was_changed_is_compared_by_what_it_trained(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"event": "evaluation", "step": step, "losses": [loss], "tokens": 64, "trained_tokens": 70 * step,
         "trained_flops": 3e9 * step}
        for step, loss in ((5, 4.0), (8, 2.0))
    ]  # fmt: skip
    results = []
    for name in ("pondering-1", "vanilla"):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text.replace("2.0", "1.0") if name != "vanilla" else text)
        found = read_result(Run(Member(name, "", (), 1, TrainConfig(8, 1), 800, 1.0), 1, tmp_path / name))
        assert found is not None
        results.append(found)
    text = write_report(tmp_path, results, [])
    assert [verdict.ahead_from for verdict in verdicts(results)] == [560]
    assert text.count("| 560 | 2.4e+10 |") == 2
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["members"][0]["runs"][0]["trained"]["8"] == {"tokens": 560, "flops": 2.4e10}


@pytest.fixture(scope="module")
def shards(tiny_shards: Any) -> Path:
    folder = tiny_shards(train=(3000,), heldout=(400,), vocab_size=VOCABULARY).folder
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/tokenizer.json").write_text("{}")
    return folder


def test_a_comparison_trains_what_is_missing_and_reports(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text("train: {precision: fp32, deepspeed: zero0, recompute: none}\noptim: {lr: 3.0e-3}\n")
    settings = [*SHAPE, f"run_dir={out}", f"data.sources.tiny.path={shards}", "train.steps=6"]

    def compare(*more: str) -> str:
        done = run_command("ponder-scale", "compare", recipe, *settings, *more)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def compare_here(*more: str) -> str:
        """Where nothing is trained."""
        options = parse(_parser(), ["compare", str(recipe), *settings, *more], RunConfig, "overrides")
        options.run(options, [])
        return capsys.readouterr().out

    with pytest.raises(ConfigError, match="no run of this comparison has an evaluation yet"):
        compare_here("--report")
    lines = [line.split() for line in compare_here("--list").splitlines()]
    assert [load(RunConfig, recipe, line).run_dir for line in lines] == [
        f"{out}/{name}/seed-1" for name in ("pondering-2", "vanilla", "vanilla-twice", "vanilla-flops")
    ]
    assert "Not finished: pondering-2/seed-1, vanilla-twice/seed-1" in compare("--only", "vanilla")
    # an interrupted run: its last checkpoint and what it recorded after the one before are lost
    shutil.rmtree(out / "vanilla/seed-1/checkpoints/step-00000006")
    printed = compare()
    assert "vanilla/seed-1 is finished" not in printed
    assert printed.count("step 6/6  loss") == 3 and "Not finished: none" in printed
    assert "There are no bits per byte" in printed  # this tokenizer tells none
    with pytest.raises(ConfigError, match="4 different runs cannot determine the 6 constants of the law"):
        fit_runs([out])
    said = re.search(r"pondering-2 against vanilla: loss (lower|higher) by \+(\d\.\d{4}) nats in one seed", printed)
    assert said is not None and "no difference is claimed" in printed
    whole = r"[1-9][\d,]*"  # of a model so small, not 0.00 M
    row = rf"\| vanilla \| [^|]+ \| {whole} \| {whole} \| \d\.\d+e\+\d\d \| [1-9][\d.]* (s|ms|min) \|"
    assert re.search(row, printed), printed
    with caplog.at_level(logging.INFO, "ponder_scale"):
        assert compare_here() == compare_here("--report")
    assert caplog.text.count("is finished") == 4
    content = json.loads((out / "compare.json").read_text())
    for member in content["members"]:
        (run,) = member["runs"]
        record = [json.loads(line) for line in (Path(run["run_dir"]) / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in record if line["event"] == "evaluation"][-1]
        assert run["finished"] and run["loss"] == last["losses"][-1] and f"{run['loss']:.4f}" in printed
        assert run["held_out_tokens"] == last["tokens"]
    for axis in ("step", "tokens", "flops"):
        curves = ET.parse(out / f"compare-by-{axis}.svg").getroot().findall("{http://www.w3.org/2000/svg}polyline")
        assert len(curves) == 4
    page = (out / "compare.html").read_text()
    assert page.count("<svg") == 3 and "http://www.w3.org/2000/svg" in page and "<script" not in page
    with pytest.raises(ConfigError, match=r"was trained with train\.steps 6, but this comparison has 7"):
        compare_here("--only", "vanilla", "train.steps=7")
    with pytest.raises(ConfigError, match="--only nobody: expected one of pondering-2/seed-1, "):
        compare_here("--only", "nobody")


def test_a_member_has_settings_of_its_own_and_they_win() -> None:
    runs = planned(extras=["vanilla-long"], own={"vanilla": ["optim.lr=0.5", "train.steps=20"]})
    assert configure(runs["vanilla/seed-1"].overrides).optim.lr == 0.5
    assert runs["vanilla/seed-1"].member.steps == 20 and runs["vanilla-twice/seed-1"].member.steps == 40
    assert runs["vanilla-long/seed-1"].member.steps == 400
    with pytest.raises(ConfigError, match="--for vanila: expected one of pondering-2, vanilla, "):
        planned(own={"vanila": ["optim.lr=0.5"]})


def test_equal_time_is_that_which_was_measured() -> None:
    ours, vanilla = (
        replace(result("pondering-2", 3, [1.0]), seconds=9.0),
        replace(result("vanilla", 3, [1.0]), seconds=4.0),
    )
    assert time_ratio([ours]) is None and time_ratio([replace(ours, finished=False), vanilla]) is None
    other = replace(result("pondering-4", 3, [1.0]), seconds=99.0)
    assert time_ratio([ours, other, vanilla]) == 2.25
    runs = planned(extras=["vanilla-time"], time_ratio=2.25)
    assert runs["vanilla-time/seed-1"].member.steps == 90
    assert configure(runs["vanilla-time/seed-1"].overrides).model.pondering_steps == 0


def test_runs_are_asked_where_nothing_is_held_out_and_each_seed_has_data_of_its_own(
    tiny_shards: Any, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    for seed in (1, 2):
        made = tiny_shards(train=(3000,), heldout=(), vocab_size=VOCABULARY, seed=seed).folder
        shutil.copytree(tiny_tokenizer, made / "tokenizer")
        made.rename(tmp_path / f"data-{seed}")
        items = [("the quick", " brown", "facts"), ("def square", "(", "facts"), ("a", "b", "others")]
        lines = [{"prompt": prompt, "answer": answer, "group": group} for prompt, answer, group in items]
        (tmp_path / f"items-{seed}.jsonl").write_text("\n".join(map(json.dumps, lines[: seed + 1])))
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text("train: {precision: fp32, deepspeed: zero0, recompute: none}\n")
    shape = [word for word in SHAPE if not word.startswith("data.sources")]
    settings = [*shape, f"run_dir={out}", f"data.sources.tiny.path={tmp_path}/data-{{seed}}", "train.steps=2"]

    def compare(*more: str) -> str:
        ask = ["--answers", tmp_path / "items-{seed}.jsonl", "--answer-steps", "0", "3"]
        done = run_command("ponder-scale", "compare", recipe, *settings, "--seeds", "1", "2", *ask, *more)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    compare("--only", "pondering-2")
    printed = compare("--only", "vanilla", "--for", "vanilla", "optim.lr=1e-3")
    assert "Nothing is held out" in printed and "## Answers: share that is right, the mean and every seed" in printed
    rows = re.findall(
        r"^\| (pondering-2|vanilla) \| S = ([03]) \| \d\.\d{3} \(\d\.\d\d \d\.\d\d\)", printed, re.MULTILINE
    )
    assert rows == [(name, steps) for name in ("pondering-2", "vanilla") for steps in "03"]
    assert "facts (2 items, +- 0.693)" in printed and "all (2 to 3 items)" not in printed
    for name in ("pondering-2", "vanilla"):
        runs = [load(RunConfig, out / name / f"seed-{seed}/config.yaml") for seed in (1, 2)]
        assert [run.data.sources["tiny"].path for run in runs] == [f"{tmp_path}/data-{seed}" for seed in (1, 2)]
        assert {run.optim.lr for run in runs} == (
            {1e-3} if name == "vanilla" else {load(RunConfig, None, SETTINGS).optim.lr}
        )
    bars = ET.parse(out / "compare-answers.svg").getroot().findall("{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + 2  # the ground, and a bar for each model
    asked = out / "vanilla/seed-1/answers.json"
    before = asked.stat().st_mtime_ns
    compare("--report", "--for", "vanilla", "optim.lr=1e-3")
    assert asked.stat().st_mtime_ns == before  # what was asked is not asked again
    refused = run_command("ponder-scale", "compare", recipe, *settings, "--list")
    assert refused.returncode == 2 and "an override contains {seed}; give the seeds with --seeds" in refused.stderr


def test_the_bars_show_each_model_at_its_best_number_of_steps_in_each_group() -> None:
    def answers(model: str, seed: int, two: list[float], three: list[float]) -> Answers:
        groups = {
            name: {"items": 8, "share": {str(steps): share for steps, share in enumerate(shares)}}
            for name, shares in (("two", two), ("three", three))
        }
        return Answers(planned(seeds=(1, 2))[f"{model}/seed-{seed}"], groups)

    found = [
        answers("pondering-2", 1, [0.0, 1.0, 0.5], [0.0, 0.25, 0.75]),
        answers("pondering-2", 2, [0.0, 0.5, 0.75], [0.0, 0.0, 1.0]),
        *(answers("vanilla", seed, [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]) for seed in (1, 2)),
    ]
    bars = ET.fromstring(answers_chart(found)).findall("{http://www.w3.org/2000/svg}rect")[1:]
    whole = float(bars[0].get("height", "0")) / 0.75
    assert [round(float(bar.get("height", "0")) / whole, 3) for bar in bars] == [0.75, 0.875, 0.25, 0.0]


def test_every_ablation_is_a_run_of_its_own() -> None:
    text = (Path(__file__).parents[2] / "examples/ablations.txt").read_text()
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    runs = [load(RunConfig, None, [*SETTINGS, *line]) for line in lines]
    for config in runs:
        model_configuration(config.model, vocab_size=VOCABULARY, seq_len=16, eod_id=0)
    assert len({config.run_dir for config in runs}) == len(runs) == int(re.search(r"--array=1-(\d+)", text)[1])  # type: ignore[index]
    assert {config.model.pondering_steps for config in runs} == set(range(6))
