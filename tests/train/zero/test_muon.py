"""Muon under ZeRO: the same losses in the stages where it is allowed, by a Muon written out here; refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from ponder_scale.errors import ConfigError
from ponder_scale.runs.records import METRICS, read
from ponder_scale.train.optim import parameter_groups
from ponder_scale.train.schedules import learning_rate
from ponder_scale.train.zero.deepspeed_config import deepspeed_config, read_sharding
from tests.ranks import KILLED, run_ranks
from tests.train.runs import SHAPE, assert_same_run, tokenized_shards, train_on_a_rank
from tests.train.zero.gradients import make_model, on_a_rank, run_config, sequences, small_buckets

MUON = ["optim.optimizer=muon", "optim.muon_lr=0.05", "optim.grad_clip=null", "train.steps=5", "optim.lr=3e-3"]
CASE = {"policy": "pass", "tied": False, "overrides": MUON}


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Five quintic Newton-Schulz iterations (Jordan et al., 2024), in double precision."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.double().mT if matrix.shape[0] > matrix.shape[1] else matrix.double()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    return x * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5


def in_plain_torch(case: dict[str, Any] = CASE) -> list[float]:
    """The losses of the same training in one process."""
    config = run_config({**case, "deepspeed": "zero0"})
    model = make_model(config)
    groups = parameter_groups(model, config.optim)
    of_muon = [parameter for group in groups if group["use_muon"] for parameter in group["params"]]
    others = [group for group in groups if not group["use_muon"]]
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    adam = torch.optim.AdamW(
        [{key: group[key] for key in ("params", "weight_decay")} for group in others],
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
    )
    momenta = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in of_muon]
    losses = []
    for step in range(config.train.steps):
        lr = learning_rate(step + 1, config.train.steps, config.optim)
        for group in adam.param_groups:
            group["lr"] = lr
        batch = sequences(step, config)
        loss = model(input_ids=batch[:, :-1], shift_labels=batch[:, 1:]).loss
        loss.backward()
        with torch.no_grad():
            for parameter, momentum in zip(of_muon, momenta, strict=True):
                gradient = parameter.grad.double()
                momentum.mul_(0.95).add_(gradient, alpha=0.05)
                update = 0.05 * gradient + 0.95 * momentum  # Nesterov's
                # y = x W of Conv1D is y = x (W^T)^T of a linear layer, whose update this is
                update = orthogonalized(update.mT).mT if id(parameter) in transposed else orthogonalized(update)
                rate = lr * config.optim.muon_lr / config.optim.lr
                parameter.mul_(1 - rate * config.optim.weight_decay).sub_((rate * update).float())
        adam.step()
        model.zero_grad()
        losses.append(loss.item())
    return losses


def uncompiled_on_a_rank(case: dict[str, Any]) -> dict[str, Any]:
    """Without compiling Muon's kernels, which takes longer than the rest."""
    import torch._dynamo

    torch._dynamo.config.disable = True
    return on_a_rank(case)


def test_muon_trains_in_stages_0_and_3_as_without_zero(tmp_path: Path) -> None:
    cases = [{**CASE, "deepspeed": small_buckets(tmp_path, stage)} for stage in (0, 3)]
    cases += [{**case, "precision": "bf16"} for case in cases]
    stage0, stage3, narrow0, narrow3 = run_ranks(uncompiled_on_a_rank, cases)
    expected = in_plain_torch()
    for ranks in (stage0, stage3):
        assert "error" not in ranks[0], ranks
        assert ranks[0]["losses"] == pytest.approx(expected, rel=2e-4)
    for ranks in (narrow0, narrow3):
        assert "error" not in ranks[0], ranks
        assert ranks[0]["losses"] == pytest.approx(expected, abs=2e-2)


def test_muon_trains_gpt2_whose_matrices_are_transposed_as_without_zero(tmp_path: Path) -> None:
    more = ["model.architecture=gpt2", "model.num_key_value_heads=null", "model.intermediate_size=128"]
    case = {**CASE, "overrides": [*MUON, *more]}
    cases = [{**case, "deepspeed": small_buckets(tmp_path, stage)} for stage in (0, 3)]
    expected = in_plain_torch(case)
    for ranks in run_ranks(uncompiled_on_a_rank, cases):
        assert "error" not in ranks[0], ranks
        assert ranks[0]["losses"] == pytest.approx(expected, rel=2e-4)


def updates_of_transposed_weights(_: Any) -> list[list[Any]]:
    """After a step of equal layers with Linear and Conv1D weights: shape, decay, and the two weights' difference."""
    import torch._dynamo
    from torch import nn

    from ponder_scale.train.zero.optimizer import _muon

    torch._dynamo.config.disable = True
    found = []
    for width, out in ((16, 48), (16, 16), (16, 64), (64, 16)):
        generator = torch.Generator().manual_seed(out)
        weight, gradient = (torch.randn(out, width, generator=generator) for _ in range(2))
        linear, conv = nn.Linear(width, out, bias=False), Conv1D(out, width)
        for decay in (0.0, 0.5):
            linear.weight.data, conv.weight.data = weight.clone(), weight.T.contiguous()
            model = nn.ModuleList([linear, conv])
            model.get_output_embeddings = lambda: nn.Linear(1, 1)  # type: ignore[assignment]
            config = run_config({**CASE, "deepspeed": "zero0", "overrides": [*MUON, f"optim.weight_decay={decay}"]})
            optimizer = _muon(parameter_groups(model, config.optim))
            for group in optimizer.param_groups:
                group["lr"] = 0.003 * group["lr_scale"]
            linear.weight.grad, conv.weight.grad = gradient.clone(), gradient.T.contiguous()
            optimizer.step()
            moved = (linear.weight - weight * (1 - 0.05 * decay)).norm() / 0.05
            expected = orthogonalized(gradient).norm()
            error = (linear.weight - conv.weight.T).norm() / moved / 0.05
            found.append([out, width, float(moved / expected), float(error)])
    return found


def test_transposed_weights_get_transposed_equal_updates() -> None:
    ((found,),) = run_ranks(updates_of_transposed_weights, [None], world_size=1)
    assert len(found) == 8
    for out, width, relative, error in found:
        assert relative == pytest.approx(1, abs=0.02), (out, width)  # of DeepSpeed's iteration in less than fp64
        assert error < 0.01, (out, width)


def test_only_the_matrices_of_the_layers_are_muons() -> None:
    for tied in (False, True):
        config = run_config({**CASE, "deepspeed": "zero3", "tied": tied})
        model = make_model(config)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        of_muon, *others = parameter_groups(model, config.optim)
        assert all(names[id(p)].endswith("_proj.weight") for p in of_muon["params"]) and of_muon["use_muon"]
        assert of_muon["lr_scale"] == pytest.approx(0.05 / 3e-3)
        rest = {names[id(p)] for group in others for p in group["params"]}
        assert "model.embed_tokens.weight" in rest and ("lm_head.weight" in rest) != tied
        assert len(rest) + len(of_muon["params"]) == len(names)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 1}, "muon with ZeRO stage 1, where its momentum .*; use a train.deepspeed of stage 0 or 3"),
        ({"stage": 2}, "muon with ZeRO stage 2"),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, "muon with offload"),
        ({"stage": 3, "zero_quantized_gradients": True}, "needs whole gradients"),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "needs whole gradients"),
    ],
)
def test_what_muon_would_get_wrong_is_refused(zero: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    config = run_config({**CASE, "deepspeed": str(path)})
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(read_sharding(str(path)), config.train, config.optim, world_size=2)


def test_a_sharding_that_says_the_default_of_zeropp_is_not_refused_with_muon(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 1}}))
    config = run_config({**CASE, "deepspeed": str(path)})
    made = deepspeed_config(read_sharding(str(path)), config.train, config.optim, world_size=1)
    assert made["zero_optimization"]["reduce_scatter"] is False


def test_clipping_and_a_missing_learning_rate_are_refused_with_muon() -> None:
    case = {"policy": "pass", "tied": False, "deepspeed": "zero3"}
    for overrides, message in [
        ([*MUON, "optim.grad_clip=1.0"], "would clip the update of Muon.*set optim.grad_clip=null"),
        (["optim.optimizer=muon", "optim.grad_clip=null"], r"muon needs it \(0.02 is usual\)"),
        (["optim.muon_lr=0.1"], "with optim.optimizer adamw"),
    ]:
        with pytest.raises(ConfigError, match=message):
            run_config({**case, "overrides": overrides})


def uncompiled_training(case: dict[str, Any]) -> str:
    import torch._dynamo

    torch._dynamo.config.disable = True
    return train_on_a_rank(case)


def test_a_run_with_muon_is_resumed_bit_for_bit(tiny_shards: Any, tiny_tokenizer: Path, tmp_path: Path) -> None:
    folder = tokenized_shards(tiny_shards, tiny_tokenizer)
    cases = []
    for name, fault in (("whole", None), ("cut", {"rank": 0, "at": "save", "how": "kill"}), ("cut", None)):
        settings = [*SHAPE, *MUON, "train.steps=4", "train.precision=bf16", "train.deepspeed=zero3"]
        overrides = [f"run_dir={tmp_path / name}", f"data.sources.a.path={folder}", *settings]
        cases.append({"overrides": overrides, "fault": fault})
    whole, cut, resumed = run_ranks(uncompiled_training, cases)
    assert whole == resumed == ["done", "done"] and cut[0] == KILLED, (whole, cut, resumed)
    assert [line["attempt"] for line in read(tmp_path / "cut" / METRICS) if line["event"] == "resume"]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
