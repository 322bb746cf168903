"""A batch that rises while training: which sizes, and that each step is the mean over just its sequences."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.config import RunConfig, TrainConfig
from ponder_scale.data.loader import Loader, open_sources
from ponder_scale.errors import ConfigError
from ponder_scale.settings import load
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.train.optim import parameter_groups
from ponder_scale.train.schedules import learning_rate
from ponder_scale.train.zero.deepspeed_config import check_ranks
from tests.ranks import run_ranks
from tests.train.runs import overrides, records, train_on_a_rank, weights
from tests.train.zero.gradients import check, small_buckets

RAMP = ["train.micro_batch=1", "train.batch_ramp_from=2", "train.batch_ramp_steps=4"]


def ramp(steps: int, global_batch: int, first: int, ramp_steps: int, **more: Any) -> TrainConfig:
    return TrainConfig(steps, global_batch, first, ramp_steps, **more)


def test_the_batch_rises_from_the_first_size_to_the_global_batch() -> None:
    assert [ramp(9, 6, 2, 5).batch_at(step) for step in range(1, 10)] == [2, 2, 4, 4, 6, 6, 6, 6, 6]
    assert [ramp(4, 8, 2, 2).batch_at(step) for step in range(1, 5)] == [2, 8, 8, 8]
    assert [ramp(4, 8, 8, 3).batch_at(step) for step in range(1, 5)] == [8, 8, 8, 8]
    assert TrainConfig(4, 8).batch_at(1) == 8 and TrainConfig(4, 8).sequences_until(3) == 24


def test_the_sequences_before_a_step_are_the_sum_of_the_batches_before_it() -> None:
    for sizes, first, ramp_steps in product((1, 2, 3, 7, 16), (1, 4), (2, 3, 5, 16, 17, 40)):
        train = ramp(60, sizes * first, first, ramp_steps)
        batches = [train.batch_at(step) for step in range(1, 61)]
        assert batches[0] == first or sizes == 1
        assert batches[ramp_steps - 1] == sizes * first and batches == sorted(batches)
        assert (batches[ramp_steps - 2] < sizes * first) == (sizes > 1)
        assert all(batch % first == 0 for batch in batches)
        assert [train.sequences_until(step) for step in range(61)] == [sum(batches[:step]) for step in range(61)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_ramp_from": 3}, r"batch_ramp_from is 3 with train\.batch_ramp_steps None; set both or neither"),
        ({"batch_ramp_steps": 3}, r"batch_ramp_from is None with train\.batch_ramp_steps 3; set both or neither"),
        ({"batch_ramp_from": 5, "batch_ramp_steps": 3}, r"is 5; expected a divisor of train\.global_batch \(12\)"),
        ({"batch_ramp_from": 0, "batch_ramp_steps": 3}, r"batch_ramp_from is 0; expected at least 1 sequences"),
        ({"batch_ramp_from": 4, "batch_ramp_steps": 1}, r"batch_ramp_steps is 1; expected at least 2 steps"),
        ({"batch_ramp_from": 4, "batch_ramp_steps": 9}, r"is 9, more than train\.steps \(8\); lower it"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(settings: dict[str, int], message: str) -> None:
    fixed = ["run_dir=x", "data.sources.a.path=x", "train.steps=8", "train.global_batch=12"]
    with pytest.raises(ConfigError, match=message):
        load(RunConfig, None, [*fixed, *(f"train.{key}={value}" for key, value in settings.items())])


def test_the_first_batch_has_to_divide_over_micro_batches_and_ranks() -> None:
    check_ranks({}, ramp(8, 24, 8, 3, micro_batch=2), 4)
    message = r"train\.batch_ramp_from is 4; expected a multiple of train\.micro_batch x ranks \(2 x 4 = 8\)"
    with pytest.raises(ConfigError, match=message):
        check_ranks({}, ramp(8, 24, 4, 3, micro_batch=2), 4)


def test_each_step_is_the_mean_over_its_batch_under_every_stage(tmp_path: Path) -> None:
    """1, 2, 3 and 3 micro-steps: DeepSpeed's own count would update after the first of the second step."""
    settings = ["train.global_batch=6", "train.batch_ramp_from=2", "train.batch_ramp_steps=3", "train.steps=4"]
    check(
        [
            {"deepspeed": small_buckets(tmp_path, stage), "policy": "pass", "tied": False, "overrides": settings}
            for stage in range(4)
        ]
    )


def test_a_run_trains_on_the_batches_that_its_ramp_says(shards: Any, tmp_path: Path) -> None:
    """On two ranks as by hand: plain torch, one process, the run's sequences cut where the sizes say."""
    settings = overrides(tmp_path, shards, *RAMP, "train.steps=5", "checkpoint.every_steps=null")
    assert run_ranks(train_on_a_rank, [{"overrides": settings}]) == [["done", "done"]]
    config = load(RunConfig, None, settings)
    sources, optim = open_sources(config.data), config.optim
    model = build_model(model_configuration(config.model, vocab_size=50, seq_len=12, eod_id=None), config.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, optim), betas=(optim.beta1, optim.beta2), eps=optim.eps)
    loader = Loader(config.data, sources, seed=config.seed, global_batch=2, micro_batch=2)
    steps = [line for line in records(tmp_path) if line["event"] == "step"]
    seen = 0
    for line, size in zip(steps, (2, 4, 6, 8, 8), strict=True):
        pairs = [loader.next_batches()[0] for _ in range(size // 2)]
        tokens, labels = (torch.cat([getattr(pair, name) for pair in pairs]) for name in ("tokens", "labels"))
        loss = model(input_ids=tokens[:, :-1], shift_labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(line["step"], 5, optim)
        optimizer.step()
        optimizer.zero_grad()
        seen += size
        assert (line["loss"], line["grad_norm"]) == pytest.approx((loss.item(), norm.item()), rel=1e-4)
        assert line["labels"] == size * 12 and line["tokens"] == seen * 12
    loader.close()
    for name, weight in weights(tmp_path).items():
        # Adam magnifies what is near 0
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=2e-4)
