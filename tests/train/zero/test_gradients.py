"""Gradients and updates under ZeRO with two ranks equal plain single-process torch: every stage, policy and tying.

Answers: losses and gradient norms that differ by stage or overlap (DeepSpeed 966, 1488, 4298, 5188, 7837), ZeRO-3
that breaks under recomputation (DeepSpeed 4332, 4505, 8130, 8148; transformers 47254).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.config import RunConfig
from ponder_scale.data.sequences import MicroBatch
from ponder_scale.settings import load
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.train.optim import parameter_groups
from ponder_scale.train.schedules import learning_rate, pondering_steps
from tests.ranks import run_ranks

VOCABULARY, SEQ_LEN, SEQUENCES, STEPS, PONDERING_STEPS = 96, 24, 4, 2, 2
RANDOM = {"deepspeed": "zero3", "policy": "pass", "tied": False}
POLICIES = ("none", "selective", "layer", "pass", "pass+layer")


def run_config(case: dict[str, Any], folder: str = "unused") -> RunConfig:
    return load(
        RunConfig,
        None,
        [
            f"run_dir={folder}",
            "model.hidden_size=32",
            "model.intermediate_size=64",
            "model.num_hidden_layers=2",
            "model.num_attention_heads=4",
            "model.num_key_value_heads=2",
            f"model.pondering_steps={PONDERING_STEPS}",
            f"model.tie_word_embeddings={str(case['tied']).lower()}",
            f"data.seq_len={SEQ_LEN}",
            "data.sources.any.path=unused",
            f"train.steps={STEPS}",
            f"train.global_batch={SEQUENCES}",
            f"train.precision={case.get('precision', 'fp32')}",
            f"train.recompute={case['policy']}",
            f"train.deepspeed={case['deepspeed']}",
            "optim.lr=1e-2",
            "optim.grad_clip=0.5",
            *case.get("overrides", []),
        ],
    )


def make_model(config: RunConfig) -> Any:
    configuration = model_configuration(config.model, vocab_size=VOCABULARY, seq_len=SEQ_LEN, eod_id=0)
    return build_model(configuration, seed=3)


def steps_of(step: int, config: RunConfig) -> int:
    return pondering_steps(step + 1, config.model.pondering_steps, config.train.pondering, config.seed)


def sequences(step: int, config: RunConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, VOCABULARY, (config.train.batch_at(step + 1), SEQ_LEN + 1), generator=generator)


def on_a_rank(case: dict[str, Any]) -> dict[str, Any]:
    """Train STEPS steps with small reduce buckets; the first step's gradients, all losses and norms."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.utils import safe_get_full_grad

    from ponder_scale.setup.recompute import apply_recompute
    from ponder_scale.setup.speed import apply_speed
    from ponder_scale.train.zero.engine import Engine, init_distributed

    torch.set_num_threads(1)
    init_distributed()
    config = run_config(case)
    model = make_model(config)
    apply_speed(model, config.train)
    apply_recompute(model, config.train.recompute, offload=config.train.offload_activations)
    engine = Engine(model, config)
    losses, norms, gradients, stacks = [], [], {}, []
    for step in range(config.train.steps):
        engine.set_learning_rate(learning_rate(step + 1, config.train.steps, config.optim))
        ponder = engine.agree_on(steps_of(step, config))
        batch, total = sequences(step, config), torch.zeros(())
        engine.set_batch(len(batch))
        for micro in range(engine.micro_steps):
            row = micro * engine.world_size + engine.rank
            sequence = batch[row : row + 1]
            loss = engine.micro_step(MicroBatch(sequence, sequence[:, 1:], None), ponder).loss
            total += loss.detach() / engine.micro_steps
            if step == 0 and micro == engine.micro_steps - 1:
                for name, parameter in engine.module.named_parameters():
                    gradient = safe_get_full_grad(parameter)
                    if engine.zero_stage == 0 and case.get("precision") != "bf16":
                        gradient = parameter.grad
                    gradients[name] = gradient.flatten().tolist() if engine.rank == 0 else None
        norm = engine.update()
        losses.append(engine.total(total).item() / engine.world_size)
        norms.append(norm)
        stacks.append(len(parameter_offload.FWD_MODULE_STACK))
    return {"losses": losses, "norms": norms, "gradients": gradients, "stage": engine.zero_stage, "stacks": stacks}


def in_plain_torch(case: dict[str, Any]) -> dict[str, Any]:
    """The same training in one process, without DeepSpeed or recomputation."""
    config = run_config(case)
    model = make_model(config)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optim), betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps
    )
    losses, norms, gradients = [], [], {}
    for step in range(config.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step + 1, config.train.steps, config.optim)
        batch = sequences(step, config)
        ponder = steps_of(step, config)
        loss = model(input_ids=batch[:, :-1], shift_labels=batch[:, 1:], pondering_steps=ponder).loss
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.flatten().tolist() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "gradients": gradients}


def small_buckets(folder: Path, stage: int, **zero: Any) -> str:
    """A DeepSpeed file whose buckets hold less than one layer's gradients, the normal case at scale."""
    settings: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 2000, **zero}
    if stage == 3:
        settings |= {"stage3_param_persistence_threshold": 0}
    path = folder / f"zero{stage}-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps({"zero_optimization": settings}))
    return str(path)


def worst(got: dict[str, list[float]], expected: dict[str, list[float]]) -> float:
    """The largest error of a gradient, relative to the largest entry of its parameter's."""
    assert got.keys() == expected.keys()
    pairs = ((torch.tensor(got[name]), torch.tensor(expected[name])) for name in expected)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def check(cases: list[dict[str, Any]], timeout: float = 120.0) -> None:
    """Each case on two ranks gives the gradients, losses and norms of plain torch, and DeepSpeed's stack of modules,
    which only stage 3 has, does not grow."""
    for case, ranks in zip(cases, run_ranks(on_a_rank, cases, timeout=timeout), strict=True):
        assert all("error" not in rank for rank in ranks), (case, ranks)
        expected = in_plain_torch(case)
        assert worst(ranks[0]["gradients"], expected["gradients"]) < 1e-5, case
        assert ranks[0]["losses"] == pytest.approx(expected["losses"], rel=1e-5), case
        assert ranks[0]["norms"] == pytest.approx(expected["norms"], rel=1e-4), case
        assert ranks[0]["losses"] == ranks[1]["losses"], case
        assert [rank["stacks"] for rank in ranks] == [[int(ranks[0]["stage"] == 3)] * len(expected["losses"])] * 2, case


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
            {"deepspeed": small_buckets(tmp_path, stage), "policy": policy, "tied": False, "overrides": compiled}
            for stage, policy in ((2, "none"), (3, "pass"))
        ],
        timeout=500.0,
    )
