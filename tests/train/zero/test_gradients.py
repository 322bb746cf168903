"""Gradients and updates under ZeRO with two ranks equal plain single-process torch: every stage, policy and tying.

Answers: losses and gradient norms that differ by stage or overlap (DeepSpeed 966, 1488, 4298, 5188, 7837), ZeRO-3
that breaks under recomputation (DeepSpeed 4332, 4505, 8130, 8148; transformers 47254).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.train.schedules import step_depth
from tests.ranks import run_ranks
from tests.train.zero.gradients import (
    POLICIES,
    check,
    make_model,
    on_a_rank,
    run_config,
    sequences,
    small_buckets,
    steps_of,
    worst,
)

RANDOM = {"deepspeed": "zero3", "policy": "pass", "tied": False}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_equal_plain_torch_for_every_policy_and_tying(stage: int, tmp_path: Path) -> None:
    deepspeed = small_buckets(tmp_path, stage)
    check([{"deepspeed": deepspeed, "policy": p, "tied": tied} for tied in (False, True) for p in POLICIES])


def test_the_norm_of_bf16_gradients_is_not_rounded_to_bf16(tmp_path: Path) -> None:
    """By hand from the gradients of the first step; a norm that is rounded has one of 256 mantissas."""
    cases = [
        {"deepspeed": small_buckets(tmp_path, stage), "policy": "pass", "tied": False, "precision": "bf16"}
        for stage in (0, 1, 2, 3)
    ]
    cases = [{**case, "overrides": ["train.steps=1"]} for case in cases]
    for case, ranks in zip(cases, run_ranks(on_a_rank, cases), strict=True):
        assert all("error" not in rank for rank in ranks), (case, ranks)
        gradients = torch.cat([torch.tensor(some, dtype=torch.float64) for some in ranks[0]["gradients"].values()])
        assert ranks[0]["norms"] == pytest.approx([gradients.norm().item()], rel=1e-6), case


def test_offloading_random_pondering_steps_and_looping_are_right_too(tmp_path: Path) -> None:
    random_steps = ["train.pondering.schedule=uniform", "train.pondering.low=0", "train.steps=5"]
    assert len({steps_of(step, run_config({**RANDOM, "overrides": random_steps})) for step in range(5)}) > 2
    cases = [
        {"deepspeed": small_buckets(tmp_path, stage), "policy": policy, "tied": False, "overrides": overrides}
        for stage in (2, 3)
        for policy, overrides in [
            ("pass", ["train.offload_activations=true"]),
            ("selective", ["train.offload_activations=true"]),
            ("pass+layer", random_steps),
            ("none", random_steps),
        ]
    ]
    looped = ["model.feedback=hidden", "model.residual=replace"]
    for stage, tied, overrides in ((2, True, looped), (3, False, looped), (3, True, [*looped, *random_steps])):
        sharding = small_buckets(tmp_path, stage)
        cases.append({"deepspeed": sharding, "policy": "pass", "tied": tied, "overrides": overrides})
    check(cases)


def test_gradients_through_the_last_passes_alone_equal_plain_torch_for_every_stage_and_policy(tmp_path: Path) -> None:
    """The passes before them run without gradient, so the engine's hooks see forwards that no backward follows."""
    last = ["train.pondering.backward_passes=2"]
    drawn = ["train.pondering.backward_passes=1", "train.pondering.schedule=uniform", "train.pondering.low=0"]
    cases = [
        {"deepspeed": small_buckets(tmp_path, 3), "policy": policy, "tied": tied, "overrides": overrides}
        for policy, tied, overrides in (
            ("none", False, [*last, "model.residual=restart", "model.feedback=hidden"]),
            ("selective", False, last),
            ("layer", False, [*drawn, "train.steps=5"]),
            ("pass", True, last),
            ("pass+layer", False, [*last, "train.offload_activations=true"]),
        )
    ]
    for stage, policy in ((0, "none"), (1, "pass"), (2, "layer")):
        cases.append({"deepspeed": small_buckets(tmp_path, stage), "policy": policy, "tied": False, "overrides": last})
    check(cases)


def test_a_learned_gate_beside_the_pondering_embedding_has_the_gradients_of_plain_torch(tmp_path: Path) -> None:
    """It is a parameter outside the layers, and a step without pondering must not take its last gradient again."""
    gate = ["model.feedback=both", "train.steps=4"]
    drawn = [*gate, "train.pondering.schedule=uniform", "train.pondering.low=0", "seed=4"]
    steps = [steps_of(step, run_config({**RANDOM, "overrides": drawn})) for step in range(4)]
    assert steps[0] > 0 and 0 in steps
    check(
        [
            {"deepspeed": small_buckets(tmp_path, stage), "policy": policy, "tied": tied, "overrides": overrides}
            for stage, policy, tied, overrides in (
                (0, "none", False, drawn),
                (1, "layer", False, drawn),
                (2, "selective", True, drawn),
                (3, "none", False, drawn),
                (3, "pass", True, gate),
                (3, "pass+layer", False, [*gate, "train.pondering.backward_passes=2"]),
            )
        ]
    )


def test_sequences_that_take_their_own_number_of_steps_are_as_if_alone(tmp_path: Path) -> None:
    """The number of passes is that of the deepest of all ranks; under stage 3 every rank has to run as many."""
    own = ["train.pondering.per=sequence", "train.pondering.low=0", "train.steps=4"]
    uniform = [*own, "train.pondering.schedule=uniform"]
    poisson = [*own, "train.pondering.schedule=lognormal-poisson", "train.pondering.mean=1"]
    depths = [step_depth(step, run_config({**RANDOM, "overrides": poisson})) for step in range(1, 5)]
    assert len({depth.most for depth in depths}) > 1  # so that stage 3 has to change its trace
    assert any(len(set(depth.by_sequence or [])) > 1 for depth in depths)
    check(
        [
            {"deepspeed": small_buckets(tmp_path, stage), "policy": policy, "tied": tied, "overrides": overrides}
            for stage, policy, tied, overrides in (
                (0, "none", False, uniform),
                (1, "layer", True, poisson),
                (2, "selective", False, poisson),
                (2, "pass", True, [*uniform, "train.pass_losses=linear"]),
                (3, "pass", False, poisson),
                (3, "pass+layer", True, [*uniform, "train.pass_losses=uniform"]),
                (3, "none", False, uniform),
            )
        ]
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_latents_and_pause_tokens_have_the_gradients_of_plain_torch(stage: int, tmp_path: Path) -> None:
    """The number of passes changes with the refinements of a step, and the pause is not used in every step."""
    latent = ["model.feedback=latent", "train.steps=4"]
    drawn = ["train.pondering.schedule=uniform", "train.pondering.low=0", "seed=4", "train.steps=4"]
    config = run_config({**RANDOM, "overrides": latent})
    assert len({step_depth(step, config).refinements for step in range(1, 5)}) == 2
    ways = [
        ("none", False, latent),
        ("selective", True, [*latent, *drawn]),
        ("layer", False, ["model.feedback=pause", *drawn]),
        ("pass", True, ["model.feedback=pause"]),
        ("pass+layer", False, [*latent, "model.pondering_steps=1", "train.offload_activations=true"]),
    ]
    check(
        [
            {"deepspeed": small_buckets(tmp_path, stage), "policy": policy, "tied": tied, "overrides": overrides}
            for policy, tied, overrides in ways
        ]
    )


def in_mixed_precision(case: dict[str, Any]) -> dict[str, Any]:
    """The first step in one process: the model in bf16, a sequence at a time as on the ranks, summed in fp32."""
    config = run_config(case)
    model = make_model(config).to(torch.bfloat16)
    batch, losses = sequences(0, config), []
    gradients = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    for sequence in batch.split(1):
        loss = model(input_ids=sequence[:, :-1], shift_labels=sequence[:, 1:], pondering_steps=steps_of(0, config)).loss
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            gradients[name] += parameter.grad.float() / len(batch)
    norm = torch.nn.utils.get_total_norm(gradients.values()).item()
    return {
        "loss": sum(losses) / len(losses),
        "norm": norm,
        "gradients": {name: gradient.flatten().tolist() for name, gradient in gradients.items()},
    }


def test_gradients_in_bf16_with_overlapping_communication_are_those_of_plain_mixed_precision(tmp_path: Path) -> None:
    """Four sequences are summed in bf16, on the ranks and over micro-steps. Each of the three sums and the division
    of each round by 2^-9 of what they round, so 1e-2 of the largest entry is the bound."""
    engines = [(0, "layer"), (1, "none"), (2, "none"), (2, "selective"), (2, "pass"), (3, "selective"), (3, "pass")]
    cases = [
        {"deepspeed": small_buckets(tmp_path, stage, overlap_comm=True), "policy": policy, "tied": stage == 1}
        for stage, policy in engines
    ]
    cases = [{**case, "precision": "bf16", "overrides": ["train.steps=1"]} for case in cases]
    expected = {tied: in_mixed_precision({**cases[0], "tied": tied}) for tied in (False, True)}
    for case, (rank, _) in zip(cases, run_ranks(on_a_rank, cases), strict=True):
        assert "error" not in rank, (case, rank)
        plain = expected[case["tied"]]
        assert worst(rank["gradients"], plain["gradients"]) < 1e-2, case
        assert rank["losses"][0] == pytest.approx(plain["loss"], rel=1e-5), case
        assert rank["norms"][0] == pytest.approx(plain["norm"], rel=5e-3), case


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler: compiled layers are not tested under ZeRO")
def test_compiled_layers_under_zero_give_the_gradients_of_plain_torch(tmp_path: Path) -> None:
    compiled = ["train.compile=true"]
    check(
        [
            {"deepspeed": small_buckets(tmp_path, stage), "policy": policy, "tied": False, "overrides": overrides}
            for stage, policy, overrides in ((2, "none", compiled), (3, "pass", [*compiled, "model.extra_heads=1"]))
        ],
        timeout=500.0,
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_of_all_passes_give_the_gradients_of_plain_torch(stage: int, tmp_path: Path) -> None:
    """Every policy, each with another mixture or feedback and another choice of weights."""
    deepspeed = small_buckets(tmp_path, stage)
    ways = [
        ("none", False, "uniform", ["model.pondering_temperature=0.7"]),
        ("selective", True, "linear", []),
        ("layer", False, "random", ["model.pondering_top_k=9", "train.steps=3"]),
        ("pass", True, "uniform", ["model.feedback=hidden", "model.residual=replace"]),
        ("pass+layer", False, "linear", ["train.pondering.schedule=uniform", "train.pondering.low=0", "train.steps=3"]),
    ]
    check(
        [
            {
                "deepspeed": deepspeed,
                "policy": policy,
                "tied": tied,
                "overrides": [f"train.pass_losses={losses}", *overrides],
            }
            for policy, tied, losses, overrides in ways
        ]
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gates_that_learn_to_halt_are_right_under_every_policy(stage: int, tmp_path: Path) -> None:
    """Also with random pondering steps, of which some use no gate, or not all of them."""
    overrides = [
        *("model.halting=gate", "model.halting_threshold=0.4", "train.halting.share=0.9"),
        *("train.halting.warmup_steps=0", "train.pondering.schedule=uniform", "train.pondering.low=0", "train.steps=4"),
    ]
    config = run_config({**RANDOM, "overrides": overrides})
    assert {steps_of(step, config) for step in range(4)} == {0, 1, 2}
    shares = make_model(config)(sequences(0, config), labels=sequences(0, config)).pass_shares
    assert 0 < shares[2] < shares[1] < 1, "nothing to see"
    ways = [("none", False), ("selective", False), ("layer", True), ("pass", True), ("pass+layer", False)]
    exits = ["model.halting=exit", "train.pass_losses=exit", *overrides[-3:]]
    check(
        [
            {"deepspeed": small_buckets(tmp_path, stage), "policy": policy, "tied": tied, "overrides": chosen}
            for policy, tied, chosen in (*((*way, overrides) for way in ways), *((*way, exits) for way in ways[1:4]))
        ],
        timeout=240,
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_heads_that_predict_further_tokens_are_right_under_every_policy(stage: int, tmp_path: Path) -> None:
    """They are layers beside the last one that run once, and share its norm and the head with S + 1 passes."""
    heads = ["model.extra_heads=2", "train.multi_token_weight=0.5"]
    drawn = ["train.pondering.schedule=uniform", "train.pondering.low=0", "train.steps=3"]
    ways = [
        ("none", False, []),
        ("selective", False, ["train.pondering.backward_passes=2"]),
        ("layer", True, drawn),
        ("pass", True, ["train.pass_losses=linear"]),
        ("pass", False, [*drawn, "train.pondering.per=sequence"]),
        ("pass+layer", False, ["model.pondering_steps=0", "train.offload_activations=true"]),
    ]
    check(
        [
            {"deepspeed": small_buckets(tmp_path, stage), "policy": policy, "tied": tied, "overrides": [*heads, *more]}
            for policy, tied, more in ways
        ]
    )
