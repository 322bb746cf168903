"""Dropout is a function of seed, step and rank: a command repeats itself, ranks differ, a resume is bit for bit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.settings import load
from ponder_scale.shards.format import ShardWriter
from ponder_scale.shards.manifest import Manifest, seal
from ponder_scale.train import generators
from tests.ranks import run_ranks
from tests.train.runs import assert_same_run, overrides, records, train_on_a_rank

GPT2 = ["model.architecture=gpt2", "evaluate.sequences=1", "train.precision=fp32"]
DROPOUT = [*GPT2, "model.extra={attn_pdrop: 0.3, resid_pdrop: 0.3, embd_pdrop: 0.3}"]
RESIDUAL = [*GPT2, "model.extra={resid_pdrop: 0.3, embd_pdrop: 0.3}"]


def train_in_a_new_process(case: dict[str, Any]) -> str:
    """Random numbers begin anywhere, as they do in a process that was not forked from one that has seeded them."""
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    return train_on_a_rank(case)


def test_a_command_repeats_itself_and_recomputation_replays_the_masks(shards: Any, tmp_path: Path) -> None:
    """The same losses, gradient norms and weights twice, and under every policy; others of another seed."""
    policies = ["none", "none", "layer", "pass", "pass+layer"]
    cases = [
        overrides(tmp_path / str(number), shards, *DROPOUT, "train.steps=2", f"train.recompute={policy}")
        for number, policy in enumerate(policies)
    ]
    cases += [
        overrides(tmp_path / policy, shards, *RESIDUAL, "train.steps=2", f"train.recompute={policy}")
        for policy in ("none", "selective")
    ]
    cases.append([*overrides(tmp_path / "seed", shards, *DROPOUT), "train.steps=2", "seed=2"])
    results = run_ranks(train_in_a_new_process, [{"overrides": case} for case in cases], world_size=1)
    assert results == [["done"]] * len(cases), results
    for number in range(1, len(policies)):
        assert_same_run(tmp_path / str(number), tmp_path / "0")
    assert_same_run(tmp_path / "selective", tmp_path / "none")
    first = {name: records(tmp_path / name)[0]["loss"] for name in ("0", "none", "seed")}
    assert len(set(first.values())) == 3


def test_a_run_with_dropout_is_resumed_bit_for_bit(shards: Any, tmp_path: Path) -> None:
    """In the middle of accumulation of several micro-batches, under stages that differ in what they gather."""
    settings = {
        stage: [*DROPOUT, f"train.deepspeed={stage}", f"train.precision={precision}", "train.recompute=pass"]
        for stage, precision in (("zero0", "fp32"), ("zero3", "bf16"))
    }
    random = ["train.pondering.schedule=uniform", "train.pondering.low=0"]
    whole = [overrides(tmp_path / f"whole-{stage}", shards, *more, *random) for stage, more in settings.items()]
    assert run_ranks(train_in_a_new_process, [{"overrides": case} for case in whole]) == [["done", "done"]] * 2
    halves = []
    for stage, more in settings.items():
        shutil.copytree(tmp_path / f"whole-{stage}", tmp_path / f"half-{stage}")
        for step in (3, 4):
            shutil.rmtree(tmp_path / f"half-{stage}" / "checkpoints" / f"step-{step:08d}")
        halves.append(overrides(tmp_path / f"half-{stage}", shards, *more, *random))
    assert run_ranks(train_in_a_new_process, [{"overrides": case} for case in halves]) == [["done", "done"]] * 2
    for stage in settings:
        lines = (tmp_path / f"half-{stage}" / "attempts.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["resumed_from"] == "step-00000002"
        assert_same_run(tmp_path / f"half-{stage}", tmp_path / f"whole-{stage}")


def losses_of_training(case: dict[str, Any]) -> list[float]:
    """The loss of each micro-batch of this rank."""
    from ponder_scale.train import loop
    from ponder_scale.train.zero.engine import Engine

    torch.set_num_threads(1)
    losses: list[float] = []
    forward = Engine._forward

    def told(self: Any, *arguments: Any, **options: Any) -> Any:
        output = forward(self, *arguments, **options)
        losses.append(output.loss.item())
        return output

    Engine._forward = told  # type: ignore[method-assign]
    loop.train(load(RunConfig, None, case["overrides"]))
    return losses


def test_ranks_micro_batches_and_steps_have_masks_of_their_own(tmp_path: Path) -> None:
    """All sequences are the same, and the learning rate does not move the weights: what differs are the masks."""
    folder = tmp_path / "shards"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    writer = ShardWriter(folder, "train-00000", 50)
    writer.add(np.full(500, 7), np.array([500]))
    seal(folder, Manifest("uint16", 50, 0, None, "a" * 64, {"train": [writer.close()], "heldout": []}))
    made = SimpleNamespace(folder=folder)
    fixed = ["optim.lr=1e-30", "optim.min_lr=0", "optim.weight_decay=0", "train.steps=2"]
    plain, without = (overrides(tmp_path / str(len(more)), made, *more, *fixed) for more in (DROPOUT, GPT2))
    masked, same = run_ranks(losses_of_training, [{"overrides": plain}, {"overrides": without}])
    assert len({round(loss, 6) for rank in same for loss in rank}) == 1, same
    found = [loss for rank in masked for loss in rank]
    assert len(found) == 2 * 2 * 2 == len({round(loss, 6) for loss in found}), masked


def test_the_random_numbers_of_a_step_are_those_of_its_seed_step_and_rank() -> None:
    import random

    def draw(*place: int) -> tuple[Any, ...]:
        generators.seed(*place)
        return random.random(), float(np.random.rand()), float(torch.rand(())), torch.initial_seed()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    places = [(1, 2, 3), (1, 2, 4), (1, 3, 3), (2, 2, 3), (12, 3, 0), (1, 23, 0)]
    drawn = [draw(*place) for place in places]
    assert all(len(set(column)) == len(places) for column in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    ("architecture", "key"), [("gpt2", "attn_pdrop"), ("llama", "attention_dropout"), ("gpt_neox", "attention_dropout")]
)
def test_selective_recomputation_of_attention_with_dropout_is_refused(architecture: str, key: str) -> None:
    """The kernel that is kept draws no random numbers again, so every later mask of the layer would be another one."""
    from ponder_scale.setup.build import build_model, model_configuration
    from ponder_scale.setup.recompute import apply_recompute

    def model(extra: str) -> Any:
        shape = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
        fixed = ["run_dir=x", "data.sources.a.path=x", "train.steps=1", "train.global_batch=1", *shape]
        config = load(RunConfig, None, [*fixed, f"model.architecture={architecture}", f"model.extra={extra}"])
        return build_model(model_configuration(config.model, vocab_size=50, seq_len=12, eod_id=0), seed=1)

    apply_recompute(model("{}"), "selective")
    sick = model(f"{{{key}: 0.1}}")
    apply_recompute(sick, "layer")
    with pytest.raises(ConfigError, match=rf"train\.recompute is selective, but model\.extra\.{key} is 0\.1"):
        apply_recompute(sick, "selective")


def test_auto_does_not_choose_what_is_refused(shards: Any) -> None:
    from ponder_scale.planning.auto import POLICIES, _Search
    from ponder_scale.setup.build import model_configuration

    def policies(*more: str) -> tuple[str, ...]:
        config = load(RunConfig, None, overrides(Path("x"), shards, *more, "train.recompute=auto"))
        configuration = model_configuration(config.model, vocab_size=50, seq_len=12, eod_id=0)
        return _Search(config, {}, configuration, devices=None).policies  # type: ignore[arg-type]

    assert policies() == POLICIES and "selective" in POLICIES
    without = tuple(policy for policy in POLICIES if policy != "selective")
    assert policies("train.compile=true") == policies("train.attention=flash_attention_2") == without
    assert policies(*DROPOUT) == tuple(policy for policy in POLICIES if policy != "selective")
