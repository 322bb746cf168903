"""Thirty-two real ranks train and save; twenty-four under another stage go on, and what they find is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.checkpoint.find import find, verify
from ponder_scale.checkpoint.index import part_files
from ponder_scale.errors import ShardError
from ponder_scale.runs.status import STALE_SECONDS
from ponder_scale.shards.format import open_shards
from ponder_scale.train.survive.watchdog import HEARTBEAT_SECONDS, heartbeat_seconds
from tests.faults import Fault
from tests.ranks import run_ranks
from tests.train.runs import overrides, records, train_on_a_rank, weights

RANKS, FEWER = 32, 24
SMALL = [
    "train.global_batch=96",
    "train.micro_batch=1",
    "model.pondering_steps=1",
    "model.num_hidden_layers=1",
    "model.hidden_size=8",
    "model.intermediate_size=16",
    "evaluate.every_steps=null",
    "optim.schedule=constant",  # a schedule by train.steps would differ between the two legs
    "health.hang_seconds=null",
]


@pytest.mark.slow
def test_32_ranks_save_and_24_go_on_under_another_stage(shards: Any, tmp_path: Path) -> None:
    run, reference = (overrides(tmp_path / name, shards, *SMALL) for name in ("run", "reference"))
    one = [*reference, "train.steps=3", "train.micro_batch=96"]
    assert run_ranks(train_on_a_rank, [{"overrides": one}], world_size=1) == [["done"]]
    first = [*run, "train.steps=2", "train.deepspeed=zero3"]
    assert run_ranks(train_on_a_rank, [{"overrides": first}], RANKS, 400.0) == [["done"] * RANKS]
    saved = find(tmp_path / "run")
    assert verify(saved) == [] and len(part_files(saved)) == RANKS
    second = [*run, "train.steps=3", "train.deepspeed=zero1"]
    assert run_ranks(train_on_a_rank, [{"overrides": second}], FEWER, 400.0) == [["done"] * FEWER]
    attempts = [json.loads(line) for line in (tmp_path / "run/attempts.jsonl").read_text().splitlines()]
    assert [(line["world_size"], line["first_step"]) for line in attempts] == [(RANKS, 1), (FEWER, 3)]
    assert len(part_files(find(tmp_path / "run"))) == FEWER
    assert len(list((tmp_path / "run/heartbeat").glob("rank-*.json"))) == FEWER
    got, expected = records(tmp_path / "run"), records(tmp_path / "reference")
    assert [(line["event"], line["step"]) for line in got if line["event"] == "step"] == [
        ("step", n) for n in (1, 2, 3)
    ]
    for line, other in zip(_steps(got), _steps(expected), strict=True):
        assert line["pass_losses"] == pytest.approx(other["pass_losses"], rel=1e-5), line["step"]
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), line["step"]
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "reference")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=2e-4)  # Adam magnifies what is near 0


def _steps(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == "step"]


def test_heartbeats_of_many_ranks_do_not_crowd_the_file_system_and_are_not_stale() -> None:
    for ranks in (1, 32, 1000, 4096):
        assert ranks / heartbeat_seconds(ranks) <= 200
        assert HEARTBEAT_SECONDS <= heartbeat_seconds(ranks) <= STALE_SECONDS / 2


@pytest.mark.faults
def test_a_shard_that_one_rank_checks_is_refused_by_all(tiny_shards: Any, tmp_path: Path, fault: Fault) -> None:
    made = tiny_shards(train=(300, 300, 300, 300), heldout=(100,), vocab_size=50)
    (made.folder / "tokenizer").mkdir()
    path = made.folder / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    case = {"overrides": overrides(tmp_path / "run", made)}
    (ranks,) = run_ranks(train_on_a_rank, [case])
    assert ranks[0] == ranks[1] and ranks[0]["error"].startswith(
        "ShardError: data.sources.tiny.path: shard train-00001.bin: index says 300"
    )
    assert not (tmp_path / "run/checkpoints").exists()
    fault("a shard cut short", "start", detected="by one rank, for all", after="refused", lost="nothing")


def test_a_shard_that_nobody_has_checked_is_checked_when_it_is_read(tiny_shards: Any) -> None:
    made = tiny_shards(train=(300, 300), vocab_size=50)
    path = made.folder / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    first, second = open_shards(made.folder, check=False).split("train")
    assert len(first.tokens) == len(open_shards(made.folder, check=False).split("train")[0].tokens) == 300
    for use in (lambda: second.tokens, lambda: second.lengths, lambda: second.offsets):
        with pytest.raises(ShardError, match=r"train-00001.bin: index says 300"):
            use()
    with pytest.raises(ShardError, match=r"train-00001.bin"):
        open_shards(made.folder)
