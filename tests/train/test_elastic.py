"""A run goes on with other ranks, another ZeRO stage and another micro-batch, from the checkpoint it has.

Answers: ZeRO checkpoints tied to the number of ranks (DeepSpeed 2898, 3810, 6441, 7546; GPT-NeoX 836).
"""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.checkpoint.find import find
from ponder_scale.checkpoint.parts import Parts, write_part
from ponder_scale.errors import CheckpointError
from tests.checkpoint.sealing import seal
from tests.ranks import KILLED, run_ranks
from tests.train.runs import assert_same_state, overrides, records, train_on_a_rank, weights


def test_a_run_goes_from_1_to_2_to_4_to_1_ranks_across_stages(shards: Any, tmp_path: Path) -> None:
    """The same data in the same order, so the same losses as a run of two ranks but for the order of sums."""
    legs = [(1, "zero3", 8), (2, "zero1", 2), (4, "zero0", 1), (1, "zero2", 4)]
    reference = overrides(tmp_path / "reference", shards)
    assert run_ranks(train_on_a_rank, [{"overrides": reference}]) == [["done", "done"]]
    for leg, (ranks, stage, micro_batch) in enumerate(legs):
        case = overrides(tmp_path / "run", shards, f"train.deepspeed={stage}", f"train.micro_batch={micro_batch}")
        fault = {"rank": 0, "at": "save", "call": 2, "how": "kill"}  # each leg takes one step, and the last the rest
        job = {"overrides": case} if leg == len(legs) - 1 else {"overrides": case, "fault": fault}
        (results,) = run_ranks(train_on_a_rank, [job], world_size=ranks)
        assert results[0] == ("done" if leg == len(legs) - 1 else KILLED), results
    attempts = [json.loads(line) for line in (tmp_path / "run/attempts.jsonl").read_text().splitlines()]
    assert [(line["world_size"], line["first_step"]) for line in attempts] == [(1, 1), (2, 2), (4, 3), (1, 4)]
    hearts = sorted(path.name for path in (tmp_path / "run" / "heartbeat").glob("rank-*.json"))
    assert hearts == ["rank-00000.json"]  # of the last attempt: what the four ranks before left is no sign of life
    for line, expected in zip(records(tmp_path / "run"), records(tmp_path / "reference"), strict=True):
        assert line["event"] == expected["event"] and line["step"] == expected["step"]
        losses = "pass_losses" if line["event"] == "step" else "losses"
        assert line[losses] == pytest.approx(expected[losses], rel=1e-5), line["step"]
    got, expected_weights = weights(tmp_path / "run"), weights(tmp_path / "reference")
    for name, weight in expected_weights.items():
        torch.testing.assert_close(got[name], weight, rtol=0, atol=2e-4)  # Adam magnifies what is near 0


def take_over_and_save(case: dict[str, Any]) -> float:
    """Load the run's checkpoint into an engine, save it again in case["out"]; the loss on fixed tokens."""
    from ponder_scale.checkpoint.parts import part_name
    from ponder_scale.config import RunConfig
    from ponder_scale.settings import load
    from ponder_scale.setup.build import build_model, model_configuration
    from ponder_scale.train.zero.engine import Engine, init_distributed

    torch.set_num_threads(1)
    init_distributed()
    config = load(RunConfig, None, case["overrides"])
    model = build_model(model_configuration(config.model, vocab_size=50, seq_len=12, eod_id=0), 5)
    engine = Engine(model, config)
    engine.partition.restore(Parts(Path(case["from"])), case["scalars"])
    Path(case["out"]).mkdir(exist_ok=True)
    begins = {"begins": engine.partition.begins()}
    write_part(Path(case["out"]) / part_name(engine.rank), engine.partition.tensors(copy=True), begins)
    assert engine.partition.scalars() == case["scalars"]
    tokens = torch.arange(26).view(2, 13)
    return float(engine.predict(tokens[:, :-1], tokens[:, 1:]).loss)


LEGS = {"fp32": [(3, 2), (1, 4), (0, 2)], "bf16": [(3, 3), (2, 1), (3, 4), (0, 1)]}  # stages and ranks


@pytest.mark.parametrize("precision", LEGS)
def test_every_partition_holds_the_same_bits(precision: str, shards: Any, tmp_path: Path) -> None:
    """Weights and optimizer states pass through all stages and 1 to 4 ranks unchanged, and so does the loss."""
    run = overrides(tmp_path / "run", shards, "train.steps=2", f"train.precision={precision}", "train.deepspeed=zero2")
    assert run_ranks(train_on_a_rank, [{"overrides": run}]) == [["done", "done"]]
    first = find(tmp_path / "run")
    scalars = json.loads((first / "state.json").read_text())["optimizer"]["scalars"]
    assert scalars == {"step": 2.0}
    folder, losses = first, []
    for number, (stage, ranks) in enumerate(LEGS[precision]):
        more = [f"train.deepspeed=zero{stage}", "train.global_batch=12", "train.micro_batch=1"]
        case = {"from": str(folder), "out": str(tmp_path / str(number)), "scalars": scalars}
        (results,) = run_ranks(take_over_and_save, [{**case, "overrides": [*run, *more]}], world_size=ranks)
        losses += results
        folder = seal(tmp_path / str(number))
        assert_same_state(folder, first)
    assert len(set(losses)) == 1, losses


def test_a_layout_that_cannot_be_named_is_refused_at_the_start(shards: Any, tmp_path: Path) -> None:
    """DeepSpeed's own map from parameters to the partition is wrong with round_robin_gradients."""
    sharding = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}
    (tmp_path / "round.json").write_text(json.dumps(sharding))
    case = overrides(tmp_path / "run", shards, f"train.deepspeed={tmp_path / 'round.json'}")
    ((first, second),) = run_ranks(train_on_a_rank, [{"overrides": case}])
    assert "ConfigError" in first["error"] + second["error"]
    assert "move or reorder optimizer states" in first["error"] + second["error"]


def test_reading_a_stretch_takes_no_more_memory_than_the_stretch(tmp_path: Path) -> None:
    """Each rank reads what it keeps: no tensor is put together, whatever the checkpoint's size."""
    size = 2**24
    whole = torch.arange(size, dtype=torch.float32)
    for rank in range(4):
        piece = whole[rank * size // 4 : (rank + 1) * size // 4]
        write_part(tmp_path / f"rank-{rank:05d}.safetensors", {"weight/a": piece}, {"begins": {"a": rank * size // 4}})
    parts, out = Parts(seal(tmp_path)), torch.empty(size // 3)
    before = resident_bytes()
    tracemalloc.start()
    parts.read("weight", "a", size // 5, out)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(out, whole[size // 5 : size // 5 + size // 3])
    assert taken < 2**20 and resident_bytes() - before < out.numel() * 4 + 2**24


def test_what_is_not_there_is_refused_by_name_and_range(tmp_path: Path) -> None:
    write_part(tmp_path / "rank-00000.safetensors", {"weight/a": torch.zeros(10)}, {"begins": {"a": 5}})
    seal(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weight for elements 15 to 20 of a; it was saved with another model"):
        Parts(tmp_path).read("weight", "a", 5, torch.empty(15))
    with pytest.raises(CheckpointError, match=r"no exp_avg for elements 0 to 1 of a"):
        Parts(tmp_path).read("exp_avg", "a", 0, torch.empty(1))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
