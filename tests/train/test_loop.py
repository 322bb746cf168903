"""Whole training runs on two ranks: metrics, refusals, and what other tests of whole runs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.config import RunConfig
from ponder_scale.settings import load
from ponder_scale.shards.packing import pack
from ponder_scale.train.console import COLUMNS
from tests.ranks import run_ranks
from tests.train.runs import STEPS, overrides, records, train_and_tell, train_on_a_rank


def test_metrics_hold_what_they_promise(shards: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = overrides(run_dir, shards, "evaluate.every_steps=2", "train.deepspeed=zero3")
    (ranks,) = run_ranks(train_on_a_rank, [{"overrides": settings}])
    assert ranks == ["done", "done"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert line["tokens"] == line["step"] * 8 * 12 and line["global_batch"] == 8
        assert line["loss"] == line["pass_losses"][-1]
        assert len(line["pass_losses"]) == len(line["pass_entropies"]) == len(line["embed_norms"]) == 3
        assert len(line["pass_kls"]) == len(line["update_norms"]) == len(line["embed_cosines"]) == 2
        assert line["mfu"] is None and line["hfu"] is None  # no peak is known of a CPU
        assert (line["seconds_left"] > 0) == (line["step"] < STEPS)
        assert 0 <= line["data_wait_share"] <= 1 and 0 < line["memory_now_gib"] <= line["memory_gib"] * 1.001
        assert all(line[key] > 0 for key in ("grad_norm", "lr", "tokens_per_second", "seconds_per_step", "memory_gib"))
    evaluations = [line for line in lines if line["event"] == "evaluation"]
    assert [(line["step"], line["tokens"], len(line["losses"])) for line in evaluations] == [(2, 72, 3), (4, 72, 3)]
    assert load(RunConfig, run_dir / "config.yaml").train.steps == STEPS


def test_another_model_or_precision_is_refused_and_nothing_is_lost(shards: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    base = overrides(run_dir, shards)
    longer = [*base, "train.steps=6"]
    cases = [
        {"overrides": base},
        {"overrides": [*longer, "model.hidden_size=32"]},
        {"overrides": [*longer, "train.precision=bf16"]},
        {"overrides": longer},
    ]
    done, wider, precision, on = run_ranks(train_on_a_rank, cases)
    assert done == on == ["done", "done"]
    assert "its model has hidden_size 16, but this run has 32" in wider[0]["error"]
    assert "saved with train.precision fp32, but this run has bf16" in precision[0]["error"]
    assert [line["step"] for line in records(run_dir) if line["event"] == "step"] == list(range(1, 7))
    attempts = [json.loads(line) for line in (run_dir / "attempts.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["first_step"], line["resumed_from"]) for line in attempts] == [
        (1, 1, None),
        (2, 5, "step-00000004"),
    ]  # those that were refused took nothing over


def test_a_finished_run_is_told_to_be_finished_also_after_a_start_that_is_refused(shards: Any, tmp_path: Path) -> None:
    base = overrides(tmp_path / "run", shards, "train.steps=2")
    cases = [{"overrides": [*base, *more], "run_dir": str(tmp_path / "run")} for more in ([], ["seed=9"], [])]
    cases[1]["overrides"] += ["model.hidden_size=32"]
    ((first,), (refused,), (again,)) = run_ranks(train_and_tell, cases, world_size=1)
    assert any("steps 1 to 2" in text for text in first["log"])
    assert all(len(text) <= COLUMNS for text in first["log"] if str(tmp_path) not in text), first["log"]
    assert "its model has hidden_size 16, but this run has 32" in refused["log"][-1]
    run, ranks = (next(text for text in refused["status"] if text.startswith(name)) for name in ("run", "ranks"))
    assert ": ended (done) " in run and "; a start " in run and "was refused: checkpoint " in run
    assert "stale" not in ranks
    assert "the run is finished: 2 steps are trained, train.steps is 2; raise train.steps to continue" in again["log"]
    assert not any("steps 3 to 2" in text for text in again["log"])
    assert "ended (done)" in again["status"][0] and "refused" not in again["status"][0]


def test_weights_and_biases_gets_the_same_numbers_offline(shards: Any, tmp_path: Path) -> None:
    case = {"overrides": overrides(tmp_path / "run", shards, "log.wandb=offline", "train.steps=2")}
    assert run_ranks(train_on_a_rank, [case]) == [["done", "done"]]
    (record,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"pass_entropies/2" in record.read_bytes()


def test_labels_weigh_the_same_however_unevenly_they_fill_the_batches(shards: Any, tmp_path: Path) -> None:
    """Packed sequences have labels that do not count; ranks and micro-batches must not change what a step learns."""
    pack(shards, 12)
    more = ["data.packing=best-fit", "data.document_mask=true", "evaluate.every_steps=2", "optim.warmup_steps=0"]
    more.append("optim.z_loss=0.1")  # large enough to be told from the loss to five digits
    two, one = (overrides(tmp_path / name, shards, *more) for name in ("two", "one"))
    assert run_ranks(train_on_a_rank, [{"overrides": two}]) == [["done", "done"]]
    whole = [*one, "train.micro_batch=8"]
    assert run_ranks(train_on_a_rank, [{"overrides": whole}], world_size=1) == [["done"]]
    got, expected = records(tmp_path / "two"), records(tmp_path / "one")
    assert [line.keys() for line in got] == [line.keys() for line in expected] and len(got) > 2 * STEPS - 3
    for line, same in zip(got, expected, strict=True):
        for key in line.keys() & {"pass_losses", "grad_norm", "losses", "z_loss"}:
            assert line[key] == pytest.approx(same[key], rel=1e-5), (key, line["step"])
        assert line.get("labels") == same.get("labels") != 8 * 12


def test_a_document_mask_reaches_the_model(shards: Any, tmp_path: Path) -> None:
    """The first loss, of equal weights on equal data, differs by what attention may see."""
    plain, masked = (overrides(tmp_path / name, shards, "train.steps=2") for name in ("plain", "masked"))
    cases = [{"overrides": plain}, {"overrides": [*masked, "data.document_mask=true"]}]
    assert run_ranks(train_on_a_rank, cases) == [["done", "done"], ["done", "done"]]
    first, second = (records(tmp_path / name)[0]["loss"] for name in ("plain", "masked"))
    assert first != second and first == pytest.approx(second, rel=0.05)


def test_what_auto_chose_is_written_down_and_kept(shards: Any, tmp_path: Path) -> None:
    auto = overrides(tmp_path / "run", shards, "train.recompute=auto", "train.micro_batch=auto")
    fresh = overrides(tmp_path / "fresh", shards, "train.recompute=auto")
    less = ["train.memory_gib=1e-6", "train.steps=6"]  # in which nothing fits
    first, second, refused = run_ranks(
        train_on_a_rank, [{"overrides": auto}, {"overrides": [*auto, *less]}, {"overrides": [*fresh, *less]}]
    )
    assert first == second == ["done", "done"]
    train = load(RunConfig, tmp_path / "run" / "config.yaml").train
    assert (train.recompute, train.micro_batch) == ("none", 4)  # everything fits; 8 sequences over 2 ranks
    assert "nothing fits" in refused[0]["error"]
