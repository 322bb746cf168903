"""What trains in a process of its own, planned and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ponder_scale.config import RunConfig
from ponder_scale.planning.plan import Devices
from ponder_scale.settings import load
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.setup.recompute import apply_recompute
from ponder_scale.train.schedules import trained_losses

VOCABULARY, SEQUENCE = 512, 64
ALONE = Devices(1, 2**40, gpu=False)
STAGE_1 = {"zero_optimization": {"stage": 1}}
SHAPE = [
    "run_dir=unused",
    "data.sources.any.path=unused",
    "train.steps=10",
    "train.global_batch=4",
    "train.micro_batch=4",
    "train.precision=fp32",
]


def plan_config(*overrides: str) -> RunConfig:
    return load(RunConfig, None, [*SHAPE, *overrides])


def small(*overrides: str) -> tuple[RunConfig, Any]:
    sizes = ["model.hidden_size=64", "model.intermediate_size=160", "model.num_hidden_layers=3"]
    config = plan_config(*sizes, "model.num_attention_heads=4", f"data.seq_len={SEQUENCE}", *overrides)
    return config, model_configuration(config.model, vocab_size=VOCABULARY, seq_len=SEQUENCE, eod_id=0)


def large(policy: str, *overrides: str) -> tuple[RunConfig, Any]:
    sizes = ["model.hidden_size=384", "model.intermediate_size=1056", "model.num_attention_heads=6", "data.seq_len=128"]
    sizes += ["model.num_hidden_layers=5", "model.pondering_steps=2"]
    config = plan_config(*sizes, f"train.recompute={policy}", "train.deepspeed=zero0", *overrides)
    return config, model_configuration(config.model, vocab_size=8000, seq_len=128, eod_id=0)


def memory(field: str) -> int:
    """A field of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def train(config: RunConfig, configuration: Any, steps: int) -> None:
    """Steps of AdamW; before the last one the peak of this process's memory is forgotten."""
    model = build_model(configuration, seed=0)
    apply_recompute(model, config.train.recompute)
    losses = trained_losses(1, configuration.pondering_steps, config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)  # without copies of moments, as on a GPU
    tokens = torch.zeros(4, 128, dtype=torch.int64)
    for step in range(steps):
        if step == steps - 1:
            Path("/proc/self/clear_refs").write_text("5")
        model(input_ids=tokens, shift_labels=tokens, skip_logits=True, **losses).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def peak(case: tuple[str, list[str]]) -> int:
    """The bytes that a training by a policy and overrides takes at its peak, without what its code takes."""
    policy, overrides = case
    torch.set_num_threads(1)
    config, configuration = large(policy, *overrides)
    smaller, _ = large(policy, *overrides, "model.hidden_size=48", "model.num_hidden_layers=1")
    warm = model_configuration(smaller.model, vocab_size=8000, seq_len=128, eod_id=0)
    train(smaller, warm, 1)
    before = memory("VmRSS")
    train(config, configuration, 2)
    return memory("VmHWM") - before
