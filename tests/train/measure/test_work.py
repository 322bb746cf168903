"""What a run has done is added up as it is done: tokens, FLOPs, steps by pondering steps, whatever it does now."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.config import RunConfig
from ponder_scale.errors import REWOUND
from ponder_scale.export.card import trained_card
from ponder_scale.planning.cost import flops_per_token
from ponder_scale.planning.shape import model_shape
from ponder_scale.runs.records import METRICS, read
from ponder_scale.runs.series import read_run
from ponder_scale.runs.status import status
from ponder_scale.settings import load
from ponder_scale.setup.build import model_configuration
from tests.checkpoint.sealing import rewrite_state
from tests.ranks import run_ranks
from tests.train.runs import log_of_training, overrides, train_on_a_rank
from tests.train.survive.incidents import FLAT, train_with_an_incident

SEQ_LEN = 12
RANDOM = ["train.pondering.schedule=uniform", "train.pondering.low=0"]


def steps_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in read(run_dir / METRICS) if line["event"] == "step"}


def state_of(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / f"checkpoints/step-{step:08d}/state.json").read_text())


def flops_of(settings: list[str], tokens_by_pondering_steps: dict[int, int]) -> float:
    config = load(RunConfig, None, settings)
    shape = model_shape(model_configuration(config.model, vocab_size=50, seq_len=SEQ_LEN, eod_id=None), SEQ_LEN)
    return sum(tokens * flops_per_token(shape, "pass", s).model for s, tokens in tokens_by_pondering_steps.items())


def check_record(run_dir: Path, settings: list[str], sequences: list[int]) -> None:
    """Metrics, checkpoints and all that reads them agree with the sizes of the batches that were trained."""
    steps, tokens, by_steps, trained = steps_of(run_dir), 0, Counter[int](), Counter[int]()
    assert sorted(steps) == list(range(1, len(sequences) + 1))
    for step, batch in enumerate(sequences, 1):
        line = steps[step]
        tokens += batch * SEQ_LEN
        by_steps[line["pondering_steps"]] += 1
        trained[line["pondering_steps"]] += batch * SEQ_LEN
        assert (line["tokens"], line["global_batch"]) == (tokens, batch), step
        assert line["flops"] == pytest.approx(flops_of(settings, trained)), step
        state = state_of(run_dir, step)
        done = state["done"]
        assert state["tokens"] == done["tokens"] == tokens and done["sequences"] == sum(sequences[:step])
        assert done["steps"] == step and done["flops"] == line["flops"]
        assert {int(key): count for key, count in done["steps_by_pondering_steps"].items()} == dict(by_steps)
    last = state_of(run_dir, len(sequences))
    card = trained_card("x", last, None, 1, None)
    assert f"{tokens:,} tokens in {len(sequences)} steps" in card
    report = read_run(run_dir, "x")
    assert report["x"]["tokens"] == [steps[step]["tokens"] for step in steps]
    assert report["x"]["flops"] == pytest.approx([steps[step]["flops"] for step in steps], rel=1e-5)
    assert report["summary"]["tokens"] == tokens
    (progress,) = [line for line in status(run_dir) if line.startswith("step ")]
    assert f"{tokens / 1e9:.3f}B tokens" in progress or f"{tokens:,}" in progress
    for line in read(run_dir / METRICS):
        if line["event"] == "evaluation":
            assert line["trained_tokens"] == steps[line["step"]]["tokens"]
            assert line["trained_flops"] == steps[line["step"]]["flops"]


def test_tokens_and_flops_are_those_that_were_trained_whatever_was_changed_and_on_whatever_ranks(
    shards: Any, tmp_path: Path
) -> None:
    """A smaller batch, random pondering steps, a ramp of the batch that is begun in its middle, other ranks."""
    fixed = overrides(tmp_path, shards, "evaluate.every_steps=1")
    smaller = [*fixed, "train.global_batch=4", "train.steps=4"]
    ramp = [*fixed, *RANDOM, "train.micro_batch=1", "train.batch_ramp_from=2", "train.batch_ramp_steps=7"]
    legs = [
        (1, [*fixed, "train.steps=2"], [8, 8]),
        (1, smaller, [4, 4]),
        (2, [*ramp, "train.steps=7"], [6, 6, 8]),  # 2 2 4 4 6 6 8 from the beginning on
        (1, [*fixed, *RANDOM, "train.global_batch=2", "train.steps=9"], [2, 2]),
    ]
    sequences: list[int] = []
    for ranks, settings, batches in legs:
        assert run_ranks(train_on_a_rank, [{"overrides": settings}], world_size=ranks) == [["done"] * ranks]
        sequences += batches
        check_record(tmp_path, settings, sequences)
    line = steps_of(tmp_path)[8]
    assert line["seconds_left"] == pytest.approx(line["seconds_per_step"])  # of the one step that is left


def test_a_skipped_step_is_done_but_not_trained_on(shards: Any, tmp_path: Path) -> None:
    settings = overrides(tmp_path, shards, *FLAT, "train.steps=4")
    case = {"overrides": settings, "at": 3, "factor": math.nan}
    assert run_ranks(train_with_an_incident, [case]) == [[0, 0]]
    state = state_of(tmp_path, 4)
    assert state["tokens"] == 4 * 8 * SEQ_LEN == steps_of(tmp_path)[4]["tokens"]
    assert (state["done"]["skipped_steps"], state["done"]["skipped_tokens"]) == (1, 8 * SEQ_LEN)
    card = trained_card("x", state, None, 1, None)
    assert f"{3 * 8 * SEQ_LEN:,} tokens in 3 steps" in card and "updates skipped: 1" in card


def test_what_a_rewind_gives_up_is_not_counted(shards: Any, tmp_path: Path) -> None:
    settings = [*FLAT, "train.steps=6", "health.spike_window=4", "health.rewind_skip_steps=2"]
    settings += ["health.on_spike=rewind", "health.spike_sigma=60", "train.batch_ramp_from=4"]
    settings += ["train.batch_ramp_steps=5"]
    case = {"overrides": overrides(tmp_path, shards, *settings), "at": 5, "factor": 1e4}
    assert run_ranks(train_with_an_incident, [case, {"overrides": case["overrides"]}]) == [[REWOUND] * 2, [0, 0]]
    assert json.loads((tmp_path / "rewinds.json").read_text())
    config = load(RunConfig, None, case["overrides"])
    sequences = [config.train.batch_at(step) for step in range(1, 7)]
    assert sequences[0] < sequences[-1] == 8
    tokens = [sum(sequences[:step]) * SEQ_LEN for step in range(1, 7)]
    assert [line["tokens"] for line in steps_of(tmp_path).values()] == tokens
    assert state_of(tmp_path, 6)["done"]["tokens"] == tokens[-1] and state_of(tmp_path, 6)["done"]["steps"] == 6


def load_an_old_checkpoint(case: dict[str, Any]) -> list[str]:
    return [message for message in log_of_training(case) if "does not record the work" in message]


def test_an_older_checkpoint_is_counted_by_its_loader_and_its_own_recipe(shards: Any, tmp_path: Path) -> None:
    """Tokens are those that its loader had read, FLOPs those of its recipe on so many."""
    base = [*overrides(tmp_path, shards), "data.skip=[[4, 6]]"]
    legs = [[*base, "train.steps=2"], [*base, *RANDOM, "train.global_batch=4", "train.steps=4"]]
    assert run_ranks(train_on_a_rank, [{"overrides": leg} for leg in legs], world_size=1) == [["done"]] * 2
    rewrite_state(tmp_path / "checkpoints" / "step-00000004", lambda state: state.pop("done"))
    on = [*base, *RANDOM, "train.global_batch=2", "train.steps=5"]
    ((told,),) = run_ranks(load_an_old_checkpoint, [{"overrides": on}], world_size=1)
    assert len(told) == 1 and "step-00000004" in told[0] and "288 tokens" in told[0]
    line, done = steps_of(tmp_path)[5], state_of(tmp_path, 5)["done"]
    tokens = (2 * 8 + 2 * 4 + 2) * SEQ_LEN
    assert line["tokens"] == done["tokens"] == tokens and done["steps"] == 5
    drawn = Counter(int(key) for key, count in done["steps_by_pondering_steps"].items() for _ in range(count))
    assert sum(drawn.values()) == 5
    before = drawn.copy()
    before[line["pondering_steps"]] -= 1
    each = {s: (2 * 8 + 2 * 4) * SEQ_LEN * count / 4 for s, count in before.items()}
    each[line["pondering_steps"]] = each.get(line["pondering_steps"], 0) + 2 * SEQ_LEN
    assert line["flops"] == pytest.approx(flops_of(on, each))  # type: ignore[arg-type]
