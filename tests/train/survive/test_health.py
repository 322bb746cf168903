"""Steps that are not finite or spike, replicas that differ: skipped, rewound, named, and never lost track of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.config import HealthConfig
from ponder_scale.errors import REWOUND, UNHEALTHY, UnhealthyError
from ponder_scale.train.survive.health import Health
from ponder_scale.train.zero.replicas import divergence
from tests.commands import run_command
from tests.faults import Fault
from tests.ranks import run_ranks
from tests.train.runs import assert_same_run, overrides, records, weights
from tests.train.survive.incidents import FLAT, train_with_an_incident

TinyShards = Callable[..., Any]
QUIET = [(2.0 + 0.1 * (-1) ** i, 1.0 + 0.05 * (-1) ** i) for i in range(8)]  # mean 2, deviation 0.1; mean 1, 0.05


def judged(health: Health, *steps: tuple[float, float]) -> list[bool]:
    return [health.accepts(loss, norm) for loss, norm in steps]


def test_a_spike_is_so_many_deviations_above_the_mean_once_half_the_window_is_there() -> None:
    health = Health(HealthConfig(spike_sigma=4.0, spike_window=8, on_spike="skip"))
    assert judged(health, *QUIET[:3], (9.0, 1.0)) == [True] * 4  # three of four that it needs
    health = Health(HealthConfig(spike_sigma=4.0, spike_window=8, on_spike="skip"))
    assert judged(health, *QUIET[:4], (9.0, 1.0)) == [True] * 4 + [False]
    health = Health(HealthConfig(spike_sigma=4.0, spike_window=8, on_spike="skip"))
    assert all(judged(health, *QUIET))
    assert judged(health, (2.39, 1.0)) == [True]
    health = Health(HealthConfig(spike_sigma=4.0, spike_window=8, on_spike="skip"))
    judged(health, *QUIET)
    assert judged(health, (2.41, 1.0), (2.0, 1.21), (0.1, 0.1)) == [False, False, True]  # only above, not below
    assert str(health.finding) == "None" and health.skips == 2
    judged(health, (2.41, 1.0))
    health.accepts(2.0, 50.0)
    assert str(health.finding).startswith("gradient norm 50.000, mean 0.")


def test_a_warning_does_not_skip_and_null_turns_spikes_off() -> None:
    health = Health(HealthConfig(spike_sigma=4.0, spike_window=8))
    assert all(judged(health, *QUIET, (9.0, 9.0))) and health.finding is not None and health.skips == 0
    health = Health(HealthConfig(spike_sigma=None, spike_window=8, on_spike="skip"))
    assert all(judged(health, *QUIET, (9.0, 9.0))) and health.finding is None


def test_steps_without_a_label_are_no_measure_for_spikes() -> None:
    health = Health(HealthConfig(spike_sigma=4.0, spike_window=8, on_spike="skip"))
    judged(health, *QUIET)
    assert all(health.accepts(0.0, 0.0, labels=0) for _ in range(8)) and health.finding is None
    assert judged(health, (2.41, 1.0), (2.39, 1.0)) == [False, True]
    assert not health.accepts(math.nan, 0.0, labels=0)


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.inf), (-math.inf, 1.0), (1.0, math.nan)])
def test_what_is_not_finite_is_always_skipped(values: tuple[float, float]) -> None:
    health = Health(HealthConfig(spike_sigma=None))
    assert not health.accepts(*values)
    assert health.finding is not None and health.finding.kind == "not finite"


def test_too_many_skips_in_a_row_end_the_run() -> None:
    health = Health(HealthConfig(max_skips=2))
    for values in ((math.nan, 1.0), (math.nan, 1.0), (1.0, 1.0), (math.nan, 1.0), (1.0, math.inf)):
        health.accepts(*values)
        health.check(7)
    restored = Health(HealthConfig(max_skips=2))
    restored.restore(json.loads(json.dumps(health.state())))
    restored.accepts(math.nan, 1.0)
    with pytest.raises(UnhealthyError, match=r"step 7: loss nan; 3 steps in a row were skipped \(health.max_skips 2\)"):
        restored.check(7)


def test_a_restored_window_judges_alike() -> None:
    config = HealthConfig(spike_sigma=4.0, spike_window=8, on_spike="skip")
    generator = torch.Generator().manual_seed(0)
    values = (1 + 0.2 * torch.randn(200, 2, generator=generator)).tolist()
    whole, cut = Health(config), Health(config)
    for number, (loss, norm) in enumerate(values):
        if number % 37 == 0:
            cut, state = Health(config), json.loads(json.dumps(cut.state()))
            cut.restore(state)
        assert whole.accepts(loss, norm) == cut.accepts(loss, norm)
    assert whole.state() == cut.state() and whole.skips > 0


def compare_on_a_rank(additions: list[tuple[int, str, int, int]]) -> list[Any] | None:
    """What `divergence` finds after additions to the bits of numbers, each by rank, tensor and index."""
    import torch.distributed as dist

    from ponder_scale.train.zero.engine import init_distributed

    init_distributed()
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(5, 7, generator=generator), "b": torch.ones(3).bfloat16(), "c": torch.zeros(4)}
    for rank, name, index, added in additions:
        if rank == dist.get_rank():
            bits = weights[name].view({2: torch.int16, 4: torch.int32}[weights[name].element_size()])
            bits.view(-1)[index] += added

    def total(values: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(values)
        return values

    found = divergence(weights, dist.get_rank(), dist.get_world_size(), total, torch.device("cpu"))
    return found and [found.ranks, found.tensors, found.majority]


def test_other_bits_name_their_rank_and_tensors() -> None:
    # 1.0 in bf16 has the bytes 3F 80, so these additions flip the lowest bit, two of the exponent and the sign.
    flips = [(rank, "b", 1, added) for rank, added in enumerate((1, 1 << 7, 1 << 14, -1 << 15))]
    moved = [(1, "b", 2, 1 - (1 << 8))]  # from one byte of a number to the other, whose sum stays
    opposite = [(2, "a", 4, 5), (2, "c", 0, -5)]  # in two tensors, likewise
    cases = [[], flips[2:3], flips[:1], flips[1:3], flips, moved, opposite]
    found = run_ranks(compare_on_a_rank, cases, world_size=4)
    expected = [
        None,
        [[2], ["b"], True],
        [[0], ["b"], True],
        [[1, 2], ["b"], False],  # half of the ranks are not most of them
        [[1, 2, 3], ["b"], False],  # where no two agree, any may be right
        [[1], ["b"], True],
        [[2], ["a", "c"], True],
    ]
    assert found == [[one] * 4 for one in expected]


@pytest.mark.faults
def test_a_run_that_skipped_a_step_is_the_run_that_never_had_its_data(
    shards: Any, tmp_path: Path, fault: Fault
) -> None:
    settings = [*FLAT, "train.steps=5", "train.precision=bf16"]
    skipped = overrides(tmp_path / "skipped", shards, *settings)
    never = overrides(tmp_path / "never", shards, *settings, "train.steps=4", "data.skip=[[16, 24]]")
    cases = [{"overrides": skipped, "at": 3, "factor": math.nan}, {"overrides": never}]
    assert run_ranks(train_with_an_incident, cases) == [[0, 0], [0, 0]]
    found, expected = weights(tmp_path / "skipped"), weights(tmp_path / "never")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    first = [line["loss"] for line in records(tmp_path / "skipped") if line["event"] == "step"]
    second = [line["loss"] for line in records(tmp_path / "never") if line["event"] == "step"]
    assert first[:2] + first[3:] == second
    evidence = json.loads((tmp_path / "skipped" / "evidence" / "step-00000003.json").read_text())
    assert evidence["sequences"] == [16, 24] and evidence["quantity"] == "grad_norm"
    assert [len(rank["pass_losses"]) for rank in evidence["ranks"]] == [3, 3] and evidence["ranks"][0]["host"]
    lines = [json.loads(line) for line in (tmp_path / "skipped" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skips"]) for line in lines if line["event"] == "skip"] == [(3, 1)]
    fault(
        "loss of rank 1 is nan",
        "backward",
        detected="before the update",
        after="as without its data",
        lost="that step's data",
    )


@pytest.mark.faults
def test_a_run_that_rewound_is_the_run_without_the_data_of_the_spike(shards: Any, tmp_path: Path, fault: Fault) -> None:
    settings = [*FLAT, "train.steps=8", "health.spike_window=4", "health.rewind_skip_steps=2"]
    # a spike is far above 6 deviations; what this tiny model does by itself must not be one
    settings += ["health.on_spike=rewind", "health.spike_sigma=60"]
    settings += ["train.deepspeed=zero3", "train.recompute=selective", "model.num_hidden_layers=1"]
    rewound = overrides(tmp_path / "rewound", shards, *settings)
    without = overrides(tmp_path / "without", shards, *settings, "data.skip=[[32, 48]]")
    spike = {"overrides": rewound, "at": 6, "factor": 1e4}
    cases = [spike, {"overrides": rewound}, {"overrides": without}]
    assert run_ranks(train_with_an_incident, cases) == [[REWOUND] * 2, [0, 0], [0, 0]]
    assert_same_run(tmp_path / "rewound", tmp_path / "without")
    lines = [json.loads(line) for line in (tmp_path / "rewound" / "metrics.jsonl").read_text().splitlines()]
    history = [(line["event"], line["step"]) for line in lines if line["event"] in ("rewind", "resume", "end")]
    assert history[:4] == [("rewind", 6), ("end", 5), ("resume", 4), ("end", 8)]
    fault(
        "loss spike",
        "backward",
        detected="before the update",
        after="rewound; as without its data",
        lost="data of the spike",
    )


@pytest.mark.faults
def test_a_rank_whose_weights_differ_ends_the_run_and_is_named(shards: Any, tmp_path: Path, fault: Fault) -> None:
    settings = ["train.global_batch=6", "train.micro_batch=1", "health.check_replicas_every=1"]
    cases = [
        {"at": 2, "overrides": overrides(tmp_path / stage, shards, *settings, f"train.deepspeed={stage}", precision)}
        for stage, precision in (("zero0", "train.precision=bf16"), ("zero2", "train.precision=bf16"))
    ]
    for number, ranks in enumerate(run_ranks(train_with_an_incident, cases, world_size=3)):
        for rank in ranks:
            assert "UnhealthyError: step 2: rank 2 (" in rank["error"], (number, rank)
            assert "no longer has the weights of the other ranks: model.embed_tokens.weight;" in rank["error"]
    (evidence,) = (tmp_path / "zero2" / "evidence").iterdir()
    assert json.loads(evidence.read_text())["ranks"] == [2]
    fault(
        "a bit flips in rank 2",
        "a step",
        detected="before the update",
        after="named; exit code 87",
        lost="nothing saved",
    )


def test_a_rewind_starts_over_by_itself_and_gives_up_in_the_end(tiny_shards: TinyShards, tmp_path: Path) -> None:
    """Real data with a real spike: text of one word, then text of many. The rest of it is no better."""
    calm, wild = (tiny_shards(train=(4000,), vocab_size=vocabulary) for vocabulary in (2, 50))
    for made in (calm, wild):
        (made.folder / "tokenizer").mkdir()
        (made.folder / "tokenizer" / "tokenizer.json").write_text("{}")
    settings = [
        setting for setting in overrides(tmp_path / "run", calm, *FLAT, "train.steps=40") if "tiny" not in setting
    ]
    settings += [f"data.sources.calm.path={calm.folder}", f"data.sources.wild.path={wild.folder}"]
    settings += ["data.phases=[{tokens: 2400, weights: {calm: 1}}, {weights: {wild: 1}}]", "model.vocab_size=50"]
    settings += [
        "health.on_spike=rewind",
        "health.spike_window=8",
        "health.max_rewinds=1",
        "health.rewind_skip_steps=2",
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    done = run_command("ponder-scale", "train", recipe, *settings, "--nproc", 2)
    assert done.returncode == UNHEALTHY, done.stdout + done.stderr
    assert "no rewind is left after 1 (health.max_rewinds)" in done.stderr.splitlines()[-1]
    told = [line for line in done.stdout.splitlines() if ": spike: " in line or "going back to" in line]
    assert len(told) == 3 == len(set(told)), told  # each once, though both ranks find it
    assert len(json.loads((tmp_path / "run" / "rewinds.json").read_text())) == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines if line["event"] in ("rewind", "end")] == ["rewind", "end", "rewind", "end"]
