"""Random valid runs on two ranks: each is resumed bit for bit and trains as plain torch does in one process.

Each day draws others. What failed is drawn again by what the failure prints, hundreds by hand with FUZZ_COUNT:

    FUZZ_SEED=20260101 FUZZ_COUNT=200 python -m pytest tests/train/test_fuzz.py
"""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ponder_scale.checkpoint.find import find
from ponder_scale.config import RunConfig
from ponder_scale.settings import load
from ponder_scale.shards.packing import pack
from tests.ranks import run_ranks
from tests.train.plain import check_against_plain_torch
from tests.train.runs import assert_same_run, assert_same_state, resumed_from, train_on_a_rank
from tests.train.zero.gradients import POLICIES

SEED = int(os.environ.get("FUZZ_SEED") or datetime.datetime.now(datetime.UTC).strftime("%Y%m%d"))
COUNT = int(os.environ.get("FUZZ_COUNT") or 3)
STEPS, HALF, SEQ_LEN = 4, 2, 12


def drawn_model(draw: random.Random) -> dict[str, Any]:
    architecture = draw.choice(("llama", "gpt_neox", "gpt2", "olmo2"))
    model = {
        "architecture": architecture,
        "hidden_size": 16,
        "intermediate_size": draw.choice((24, 32)),
        "num_hidden_layers": draw.choice((1, 1, 2)),
        "num_attention_heads": 2,
        "pondering_steps": draw.choice((0, 1, 2, 2, 3)),
        "tie_word_embeddings": draw.choice(("true", "false", "null")),
        "scale_embeds": draw.choice(("true", "false")),
        "feedback": draw.choice(("embedding", "embedding", "hidden", "both")),
        "residual": draw.choice(("accumulate", "restart", "replace")),
    }
    if model["feedback"] != "hidden":
        model |= {"pondering_temperature": draw.choice((1.0, 0.7)), "pondering_top_k": draw.choice(("null", "null", 5))}
    if architecture in ("llama", "olmo2"):
        model["num_key_value_heads"] = draw.choice(("null", 1))
    if architecture == "gpt2" and draw.random() < 0.4:
        model["extra"] = "{resid_pdrop: 0.2, attn_pdrop: 0.2, embd_pdrop: 0.1}"
    return model


def drawn_sharding(draw: random.Random, *, precision: str, muon: bool) -> dict[str, Any]:
    stage = draw.choice((0, 3) if muon else (0, 1, 1, 2, 2, 3, 3, 3))
    zero: dict[str, Any] = {"stage": stage}
    sharding: dict[str, Any] = {"zero_optimization": zero}
    for key, values in (
        ("overlap_comm", (True, False)),
        ("reduce_bucket_size", (500, 2000, 500_000)),
        ("contiguous_gradients", (True, True, False)),
        ("reduce_scatter", (True, True, False)),
    ):
        if stage and draw.random() < 0.6:
            zero[key] = draw.choice(values)
    if stage == 3:
        for key, values in (
            ("stage3_param_persistence_threshold", (0, 100)),
            ("stage3_max_live_parameters", (0, 3000)),
            ("stage3_max_reuse_distance", (0, 3000)),
            ("stage3_prefetch_bucket_size", (0, 1000)),
            ("sub_group_size", (1000, 10**9)),
            ("zero_hpz_partition_size", (1,) if muon else (1, 2)),
        ):
            if draw.random() < 0.5:
                zero[key] = draw.choice(values)
    if stage and not muon and shutil.which("g++") and draw.random() < 0.15:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    if stage == 1 and precision == "bf16" and "offload_optimizer" not in zero and draw.random() < 0.3:
        sharding["data_types"] = {"grad_accum_dtype": "fp32"}
    return sharding


def drawn_training(draw: random.Random, precision: str, steps: int) -> dict[str, Any]:
    policy = draw.choice(POLICIES)
    train = {"recompute": policy, "precision": precision, "micro_batch": draw.choice((1, 2)), "global_batch": 4}
    if policy != "none" and draw.random() < 0.3:
        train["offload_activations"] = "true"
    if draw.random() < 0.3:
        train |= {"global_batch": 8, "micro_batch": 1, "batch_ramp_from": 2, "batch_ramp_steps": draw.choice((2, 3, 4))}
    schedule = draw.choice(("fixed", "uniform", "ramp"))
    if schedule != "fixed":
        train |= {"pondering.schedule": schedule, "pondering.low": draw.randint(0, steps)}
        train["pondering.ramp_steps"] = draw.choice((1, 2, 4))
    if schedule == "uniform" and draw.random() < 0.5:
        train["pondering.per"] = "sequence"
    train["sanity_step"] = draw.choice(("true", "false", "false"))
    return train


def drawn_optimizer(draw: random.Random, *, muon: bool) -> dict[str, Any]:
    optim = {
        "lr": draw.choice((1e-2, 1e-3)),
        "warmup_steps": draw.choice((0, 2)),
        "schedule": draw.choice(("cosine", "linear", "constant")),
        "grad_clip": "null" if muon else draw.choice((1.0, 0.1, "null")),
        "weight_decay": draw.choice((0.0, 0.1)),
        "decay": draw.choice(("matrices", "all")),
        "z_loss": draw.choice((0.0, 0.0, 1e-2)),
        "ema": draw.choice(("null", "null", 0.5)),
        "min_lr": 1e-4,
    }
    return optim | ({"optimizer": "muon", "muon_lr": 0.02} if muon else {})


def configuration(seed: int, number: int, sharding: Path) -> list[str]:
    """The overrides of run `number`; its DeepSpeed file is written to `sharding`."""
    draw = random.Random(f"fuzz {seed} {number}")
    muon, precision = draw.random() < 0.15, draw.choice(("fp32", "bf16"))
    model = drawn_model(draw)
    sharding.write_text(json.dumps(drawn_sharding(draw, precision=precision, muon=muon)))
    groups = {
        "model": model,
        "train": drawn_training(draw, precision, model["pondering_steps"]) | {"deepspeed": sharding, "steps": STEPS},
        "optim": drawn_optimizer(draw, muon=muon),
        "data": {
            "seq_len": SEQ_LEN,
            "packing": draw.choice(("concat", "concat", "best-fit")),
            "document_mask": draw.choice(("true", "false")),
        },
        "checkpoint": {"every_steps": HALF, "keep": "null", "asynchronous": draw.choice(("true", "false"))},
        "evaluate": {"sequences": 4, "every_steps": draw.choice(("null", 1, HALF))},
        "log": {"every_steps": 1},
    }
    settings = [f"{group}.{key}={value}" for group, values in groups.items() for key, value in values.items()]
    return [*settings, f"seed={draw.randrange(1000)}"]


def uncompiled(case: dict[str, Any]) -> str:
    """Without compiling Muon's kernels, which takes longer than the rest."""
    import torch._dynamo

    torch._dynamo.config.disable = True
    return train_on_a_rank(case)


@pytest.fixture(scope="module")
def packed(tiny_shards: Callable[..., Any]) -> Any:
    made = tiny_shards(train=(900, 700), heldout=(200,), vocab_size=50)
    (made.folder / "tokenizer").mkdir()
    (made.folder / "tokenizer" / "tokenizer.json").write_text("{}")
    pack(made, SEQ_LEN)
    return made


@pytest.mark.parametrize("number", range(COUNT))
def test_a_random_run_is_resumed_bit_for_bit_and_trains_as_plain_torch(
    number: int, packed: Any, tmp_path: Path
) -> None:
    settings = configuration(SEED, number, tmp_path / "sharding.json")
    settings.append(f"data.sources.tiny.path={packed.folder}")
    again = f"FUZZ_SEED={SEED} FUZZ_COUNT={number + 1} python -m pytest tests/train/test_fuzz.py -k 'torch[{number}]'"
    print(f"repeat it by: {again}\n", *settings, (tmp_path / "sharding.json").read_text(), sep="\n")
    whole, half = tmp_path / "whole", tmp_path / "half"
    trained = run_ranks(uncompiled, [{"overrides": [*settings, f"run_dir={whole}"]}], timeout=300.0)
    assert trained == [["done", "done"]], again
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints" / f"step-{STEPS:08d}")
    resumed = run_ranks(uncompiled, [{"overrides": [*settings, f"run_dir={half}"]}], timeout=300.0)
    assert resumed == [["done", "done"]], again
    assert resumed_from(half) == [None, f"step-{HALF:08d}"], again
    assert_same_run(half, whole)
    assert_same_state(find(half), find(whole), kinds=None)
    config = load(RunConfig, None, [*settings, f"run_dir={whole}"])
    if config.optim.optimizer == "adamw" and not config.model.extra:
        check_against_plain_torch(config, whole)
