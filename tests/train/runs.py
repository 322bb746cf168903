"""Whole tiny runs on real ranks: their settings, their faults, what they computed and whether two did the same."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ponder_scale.checkpoint.find import find
from ponder_scale.checkpoint.parts import Parts
from ponder_scale.checkpoint.weights import read_weights
from ponder_scale.config import RunConfig
from ponder_scale.errors import UserError
from ponder_scale.runs.records import COMPUTED
from ponder_scale.runs.status import status
from ponder_scale.settings import load
from ponder_scale.shards.manifest import tokenizer_sha256

STEPS = 4
SHAPE = [
    "model.hidden_size=16",
    "model.intermediate_size=32",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.pondering_steps=2",
    "data.seq_len=12",
    "train.global_batch=8",
    "train.micro_batch=2",
    "train.deepspeed=zero1",  # stage 3 takes three times as long; tests that are about it ask for it
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "checkpoint.every_steps=1",
    "checkpoint.keep=null",
    "evaluate.sequences=6",
    "log.every_steps=1",
    "train.sanity_step=false",  # a fifth of these runs; test_sanity.py is about it
]


def train_on_a_rank(case: dict[str, Any]) -> str:
    """Train by the overrides of the case; where it names a fault, it comes to this rank at a call of a function.

    A fault is {"rank", "at", "call": the number of the first call it comes to, "calls": to how many, "how"}; how:
    "kill" and "stop" (SIGKILL and SIGSTOP to this process) before the call, "kill after" it, or "full": during it,
    the system refuses to let any file grow.
    """
    from ponder_scale.checkpoint import parts
    from ponder_scale.checkpoint import save as checkpoint
    from ponder_scale.train import loop, state

    torch.set_num_threads(1)
    fault = case.get("fault")
    if fault and os.environ["RANK"] == str(fault["rank"]):
        owner: Any = {"save": state.RunState, "sync": parts}.get(fault["at"], checkpoint)
        original, calls = getattr(owner, fault["at"]), []

        def faulty(*arguments: Any, **options: Any) -> Any:
            calls.append(1)
            if not 0 <= len(calls) - fault.get("call", 2) < fault.get("calls", 1):
                return original(*arguments, **options)
            if fault["how"] == "full":
                return with_full_disk(lambda: original(*arguments, **options))
            if fault["how"] == "kill after":
                original(*arguments, **options)
            if fault["how"] == "stop":
                Path(case["pid_file"]).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP if fault["how"] == "stop" else signal.SIGKILL)
            time.sleep(1)  # a signal to the process may reach another thread of it first
            return original(*arguments, **options)

        setattr(owner, fault["at"], faulty)
    loop.train(load(RunConfig, None, case["overrides"]))
    return "done"


def with_full_disk(action: Callable[[], Any]) -> Any:
    """Run the action while the system lets no file grow beyond 8 bytes, a real error of the real system call."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        return action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def overrides(run_dir: Path, shards: Any, *more: str) -> list[str]:
    sources = [f"run_dir={run_dir}", f"data.sources.tiny.path={shards.folder}", f"train.steps={STEPS}"]
    return [*sources, *SHAPE, "train.precision=fp32", *more]


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What a run computed: steps and evaluations, without what depends on the clock."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds_per_step", "seconds_left", "tokens_per_second", "data_wait_share", "memory_gib", "memory_now_gib")
    computed = [line for line in lines if line["event"] in COMPUTED]
    return [{key: value for key, value in line.items() if key not in (*clock, "time", "attempt")} for line in computed]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return dict(read_weights(find(run_dir)))


def assert_same_run(run_dir: Path, reference: Path) -> None:
    assert records(run_dir) == records(reference)
    got, expected = weights(run_dir), weights(reference)
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(got[name], weight), name


def resumed_from(run_dir: Path) -> list[str | None]:
    """The checkpoint from which each attempt of a run went on."""
    return [json.loads(line)["resumed_from"] for line in (run_dir / "attempts.jsonl").read_text().splitlines()]


ADAM = ("exp_avg", "exp_avg_sq", "weight")


def assert_same_state(folder: Path, reference: Path, kinds: tuple[str, ...] | None = ADAM) -> None:
    """Weights and optimizer states of two checkpoints are the same bits, however they are cut over ranks.

    `kinds` are those that each parameter has to have; None: whatever the reference has.
    """
    got, expected = Parts(folder), Parts(reference)
    assert got.table.keys() == expected.table.keys()
    for key in expected.table:
        kind, name = key.split("/", 1)
        assert kinds is None or tuple(got.kinds(name)) == kinds
        length = max(stretch.begin + stretch.length for stretch in expected.table[key])
        tensors = [torch.empty(length) for _ in range(2)]
        for parts, tensor in zip((got, expected), tensors, strict=True):
            parts.read(kind, name, 0, tensor)
        assert torch.equal(*tensors), key


def log_of_training(case: dict[str, Any]) -> list[str]:
    """What a run logs while it trains by the overrides of the case."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ponder_scale").addHandler(handler)
    logging.getLogger("ponder_scale").setLevel(logging.INFO)
    train_on_a_rank(case)
    return messages


def tokenized_shards(tiny_shards: Any, tokenizer: Path, **arguments: Any) -> Path:
    """Shards with their tokenizer beside them."""
    identity = tokenizer_sha256([tokenizer / "tokenizer.json"])
    made = tiny_shards(vocab_size=300, tokenizer=identity, **arguments)
    (made.folder / "tokenizer").mkdir(exist_ok=True)
    for file in tokenizer.iterdir():
        (made.folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    return made.folder


def train_and_tell(case: dict[str, Any]) -> dict[str, Any]:
    """What a training, or its refusal, logs on its only rank, and what `ponder-scale status` says after it."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ponder_scale").addHandler(handler)
    logging.getLogger("ponder_scale").setLevel(logging.INFO)
    try:
        train_on_a_rank(case)
    except UserError as error:
        lines.append(str(error))
    return {"log": lines, "status": status(Path(case["run_dir"]))}
