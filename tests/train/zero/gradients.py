"""A few steps under ZeRO on real ranks and in plain single-process torch, and whether they are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ponder_scale.config import RunConfig
from ponder_scale.data.sequences import MicroBatch
from ponder_scale.settings import load
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.train.optim import parameter_groups
from ponder_scale.train.schedules import halting_loss, learning_rate, pass_weights, step_depth, trained_losses
from tests.ranks import run_ranks

VOCABULARY, SEQ_LEN, SEQUENCES, STEPS, PONDERING_STEPS = 96, 24, 4, 2, 2
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
    model = build_model(configuration, seed=3)
    for gate in getattr(model, "halting_gates", ()):  # new ones are open and alike
        torch.nn.init.normal_(gate.down.weight, std=20.0, generator=torch.Generator().manual_seed(1))
        torch.nn.init.constant_(gate.down.bias, 0.0)
    return model


def steps_of(step: int, config: RunConfig) -> int:
    return step_depth(step + 1, config).most


def weights_of(step: int, config: RunConfig) -> tuple[float, ...] | None:
    return pass_weights(step + 1, steps_of(step, config), config.train.pass_losses, config.seed)


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
        ponder, depth = engine.agree_on(steps_of(step, config)), step_depth(step + 1, config)
        batch, total = sequences(step, config), torch.zeros(())
        engine.set_batch(len(batch))
        for micro in range(engine.micro_steps):
            row = micro * engine.world_size + engine.rank
            sequence = batch[row : row + 1]
            own = depth.of(micro, 1, rank=engine.rank, ranks=engine.world_size)
            rows = MicroBatch(sequence, sequence[:, 1:], None)
            loss = engine.micro_step(
                rows, ponder, own, refinements=depth.refinements, **trained_losses(step + 1, depth.most, config)
            ).loss
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
        loss = loss_of(model, batch, step, config)
        loss.backward()
        if step == 0:
            gradients = {name: p.grad.flatten().tolist() for name, p in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "gradients": gradients}


def loss_of(model: Any, batch: torch.Tensor, step: int, config: RunConfig) -> torch.Tensor:
    """The mean loss of a step's sequences; where each takes its own number of steps, each runs alone.

    So does each where gates learn, because a rank and a micro-batch have smallest gates of their own. Weighted losses
    of passes are those of as many forwards, each of the model that ponders less.
    """
    depth = step_depth(step + 1, config)
    gates, heads = halting_loss(step + 1, config), bool(config.model.extra_heads)
    rows = [batch] if depth.by_sequence is None and gates is None else batch.split(1)
    steps, passes = depth.by_sequence or [depth.most] * len(rows), config.train.pondering.backward_passes
    weights = weights_of(step, config) or (*[0.0] * depth.most, 1.0)
    losses = [
        weight
        * model(
            input_ids=row[:, :-1],
            shift_labels=row[:, 1:],
            pondering_steps=min(index, number),
            backward_passes=passes,
            halting_loss=gates,
            # only the last of the forwards has the heads, whose weight must not depend on the passes'
            multi_token_weight=config.train.multi_token_weight / weight if heads and index == depth.most else None,
            refinements=depth.refinements,
        ).loss
        for row, number in zip(rows, steps, strict=True)
        for index, weight in enumerate(weights)
        if weight > 0
    ]
    return torch.stack(losses).sum() / len(rows)


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
