"""What a resumed run does otherwise than its checkpoint: each key is told once, and what cannot be is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ponder_scale.runs.records import METRICS, read
from ponder_scale.runs.status import status
from ponder_scale.shards.packing import pack
from ponder_scale.train.changes import Change, between
from tests.ranks import run_ranks
from tests.tiny import make_shards
from tests.train.runs import log_of_training, overrides, train_on_a_rank

ALLOWED = {  # key: what is given, before and after in the record
    "optim.lr": ("2e-2", 1e-2, 2e-2),
    "optim.decay": ("all", "matrices", "all"),
    "optim.weight_decay": ("0.2", 0.1, 0.2),
    "optim.beta2": ("0.9", 0.95, 0.9),
    "optim.grad_clip": ("null", 1.0, None),
    "optim.schedule": ("linear", "cosine", "linear"),
    "train.steps": ("3", 2, 3),
    "train.global_batch": ("4", 8, 4),
    "train.pondering.schedule": ("uniform", "fixed", "uniform"),
    "data.document_mask": ("true", False, True),
    "data.skip": ("[[100, 104]]", [], [[100, 104]]),
    "health.on_spike": ("skip", "warn", "skip"),
    "model.init_from": ("nowhere", None, "nowhere"),
}


def changes_of(run_dir: Path) -> list[tuple[int, str, Any, Any]]:
    lines = [line for line in read(run_dir / METRICS) if line["event"] == "change"]
    return [(line["attempt"], line["key"], line["before"], line["after"]) for line in lines]


def test_each_changed_key_is_told_once_with_both_values_in_log_attempts_and_metrics(
    shards: Any, tmp_path: Path
) -> None:
    base = overrides(tmp_path, shards, "train.steps=2")
    other = [*base, *(f"{key}={given}" for key, (given, _, _) in ALLOWED.items())]
    first, second, again = run_ranks(log_of_training, [{"overrides": case} for case in (base, other, other)], 1)
    expected = {key: [before, after] for key, (_, before, after) in ALLOWED.items()}
    attempts = [json.loads(line) for line in (tmp_path / "attempts.jsonl").read_text().splitlines()]
    assert [line["changed"] for line in attempts] == [{}, expected, {}]
    assert {key: [before, after] for _, key, before, after in changes_of(tmp_path)} == expected
    assert [attempt for attempt, *_ in changes_of(tmp_path)] == [2] * len(expected)
    for log, count in ((first[0], 0), (second[0], len(expected)), (again[0], 0)):
        told = [line for line in log if " it was " in line]
        assert len(told) == count, told
    assert "optim.lr is 0.02 from step 3 on; it was 0.01" in second[0]
    assert 'optim.decay is "all" from step 3 on; it was "matrices"' in second[0]
    assert "optim.grad_clip is null from step 3 on; it was 1.0" in second[0]
    (line,) = [line for line in status(tmp_path) if line.startswith("attempt")]
    assert "changed" not in line
    (events,) = [line for line in status(tmp_path) if line.startswith("events")]
    assert "change at step" not in events  # they would leave no room for the others


def test_ranks_and_the_contents_of_the_sharding_file_are_told_too(shards: Any, tmp_path: Path) -> None:
    sharding = tmp_path / "mine.json"
    settings = overrides(tmp_path / "run", shards, f"train.deepspeed={sharding}")
    found = []
    for steps, ranks, zero in ((1, 1, {"stage": 1}), (2, 2, {"stage": 2, "overlap_comm": False})):
        sharding.write_text(json.dumps({"zero_optimization": zero}))
        case = [*settings, "optim.warmup_steps=0", f"train.steps={steps}"]
        assert run_ranks(train_on_a_rank, [{"overrides": case}], world_size=ranks) == [["done"] * ranks]
        found = changes_of(tmp_path / "run")
    assert {key: (before, after) for _, key, before, after in found} == {
        "train.steps": (1, 2),
        "world_size": (1, 2),
        "deepspeed.zero_optimization.stage": (1, 2),
        "deepspeed.zero_optimization.overlap_comm": (None, False),
    }
    (line,) = [line for line in status(tmp_path / "run") if line.startswith("attempt")]
    assert "changed: " in line and "train.steps" in line and "world_size" in line


def test_values_are_compared_as_a_checkpoint_gives_them_back() -> None:
    saved = {"config": {"a": 1.0, "b": {}, "c": [1, [2]], "e": {"x": 1}}, "versions": {"torch": "2"}}
    now = {"config": {"a": 1, "b": {}, "c": (1, (2,)), "d": None, "e": {"y": 1}}, "versions": {"torch": "3"}}
    assert between(saved, now) == [Change("e.x", 1, None), Change("e.y", None, 1), Change("versions.torch", "2", "3")]


REFUSED = {  # of what the documents say cannot be gone on with; width and precision are in test_loop.py
    "optim.optimizer=muon optim.muon_lr=0.05 optim.grad_clip=null train.deepspeed=zero3": "saved with optimizer AdamW",
    "model.pondering_steps=1": "its model has pondering_steps 2, but this run has 1",
    "model.extra={attention_dropout: 0.1}": "its model has attention_dropout 0.0, but this run has 0.1",
    "model.architecture=gpt_neox": "its model has",
    "seed=2": "seed: the checkpoint has seed 1, but this run has 2",
    "data.seq_len=11 model.max_position_embeddings=12": "data.seq_len",
    "data.packing=best-fit": "data.packing",
    "data.phases=[{tokens: 960}, {weights: {tiny: 1}}]": "data.sources: this run has other weights",
    "data.sources.tiny.path=OTHER": "data.sources: this run has other shards",
}


def test_what_the_documents_say_is_refused_is_refused_and_nothing_is_taken_over(shards: Any, tmp_path: Path) -> None:
    pack(shards, 12)
    (tmp_path / "other").mkdir()
    other = make_shards(tmp_path / "other", train=(900, 700), vocab_size=50, seed=7)
    shutil.copytree(shards.folder / "tokenizer", other.folder / "tokenizer")
    base = overrides(tmp_path / "run", shards, "train.steps=2")
    assert run_ranks(train_on_a_rank, [{"overrides": base}], world_size=1) == [["done"]]
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    longer = [*base, "train.steps=3"]
    cases = []
    for settings in REFUSED:
        words = [settings] if "{" in settings else settings.replace("OTHER", str(other.folder)).split()
        cases.append({"overrides": [*longer, *words]})
    for (settings, message), (result,) in zip(REFUSED.items(), run_ranks(train_on_a_rank, cases, 1), strict=True):
        assert result != "done", settings
        assert message in result["error"] and "\n" not in result["error"], (settings, result)
        assert result["error"].startswith(("CheckpointError: ", "ConfigError: ")), (settings, result)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    same = {path for path in before if "heartbeat" not in path.parts}
    assert all(after[path] == before[path] for path in same)
    assert {path.name for path in set(after) - set(before)} <= {"rank-00000.json"}


def test_muon_is_not_gone_on_with_as_adamw(shards: Any, tmp_path: Path) -> None:
    muon = ["optim.optimizer=muon", "optim.muon_lr=0.05", "optim.grad_clip=null", "train.deepspeed=zero0"]
    base = overrides(tmp_path, shards, "train.steps=1", "optim.warmup_steps=0", "train.sanity_step=false")
    cases = [{"overrides": [*base, *muon]}, {"overrides": [*base, "train.deepspeed=zero0", "train.steps=2"]}]
    (done,), (refused,) = run_ranks(uncompiled_training, cases, world_size=1)
    assert done == "done"
    assert "was saved with optimizer MuonWithAuxAdam, but this run has AdamW; use MuonWithAuxAdam" in refused["error"]


def uncompiled_training(case: dict[str, Any]) -> str:
    import torch._dynamo

    torch._dynamo.config.disable = True
    return train_on_a_rank(case)
