"""A run as plain torch trains it in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ponder_scale.config import RunConfig
from ponder_scale.data.loader import Loader, open_sources
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.train.optim import parameter_groups
from ponder_scale.train.schedules import learning_rate, step_depth
from tests.train.runs import records


def in_plain_torch(config: RunConfig) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of the same run in one process, its batch in one piece."""
    sources, optim, train = open_sources(config.data), config.optim, config.train
    manifest = next(iter(sources.values())).manifest
    model = build_model(
        model_configuration(
            config.model, vocab_size=manifest.vocab_size, seq_len=config.data.seq_len, eod_id=manifest.eod_id
        ),
        config.seed,
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, optim), betas=(optim.beta1, optim.beta2), eps=optim.eps)
    unit, seen = train.batch_unit, []
    loader = Loader(config.data, sources, seed=config.seed, global_batch=unit, micro_batch=unit)
    for step in range(1, train.steps + 1):
        pieces = [batch for _ in range(train.batch_at(step) // unit) for batch in loader.next_batches()]
        tokens, labels = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("tokens", "labels"))
        masked = (
            {"position_ids": torch.cat([piece.position_ids for piece in pieces])} if config.data.document_mask else {}
        )
        depth = step_depth(step, config)
        loss = model(
            input_ids=tokens[:, :-1],
            shift_labels=labels,
            pondering_steps=depth.most,
            sequence_steps=None if depth.by_sequence is None else torch.tensor(depth.by_sequence),
            z_loss=optim.z_loss,
            **masked,
        )
        loss.loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if optim.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, train.steps, optim)
        optimizer.step()
        optimizer.zero_grad()
        seen.append((float(loss.pass_losses[-1]), norm.item()))
    loader.close()
    return seen


def check_against_plain_torch(config: RunConfig, run_dir: Path) -> None:
    got = [(line["loss"], line["grad_norm"]) for line in records(run_dir) if line["event"] == "step"]
    expected = in_plain_torch(config)
    if config.train.precision == "fp32":
        for one, other in zip(got, expected, strict=True):
            assert one == pytest.approx(other, rel=2e-3)
        assert got[0] == pytest.approx(expected[0], rel=1e-4)  # before Adam magnifies what is near 0
    else:
        assert got[0][0] == pytest.approx(expected[0][0], abs=5e-2)
