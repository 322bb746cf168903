"""`python -m benchmarks start` compares processor time to the first step, and per step, with transformers' Trainer.

Both train a LLaMA of the same shape without pondering, on two gloo ranks, with the same DeepSpeed and settings file.
Ranks are started as a launcher starts them, and neither figure includes the launcher's own time. Each rank reads its
processor time after each update of the engine, including that of child processes that have ended. The first reading
covers everything from the first import on. The difference of two readings is one step with everything around it.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.scale import make_shards
from ponder_scale.config import RunConfig
from ponder_scale.settings import load, to_yaml
from ponder_scale.train.launch import RANK_VARIABLES, free_port

RANKS = 2
TRAINER, OURS = "transformers' Trainer", "ponder-scale train"
PLAIN = "the same, train.sanity_step=false"
RANK = ["-m", "benchmarks.start"]  # the arguments that start a rank
WAITS = 0.1  # seconds between two checks of the ranks


@dataclass(frozen=True)
class Shape:
    """The shape of the model and its sequences."""

    hidden: int = 256
    layers: int = 8
    vocabulary: int = 32000
    length: int = 512

    @property
    def model(self) -> dict[str, int]:
        """The shape under the names that recipes and transformers' LlamaConfig share."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": 8 * round(self.hidden * 2.6875 / 8),
            "num_hidden_layers": self.layers,
            "num_attention_heads": max(1, self.hidden // 64),
            "vocab_size": self.vocabulary,
        }


@dataclass(frozen=True)
class Cost:
    """Processor seconds of both ranks together."""

    start: float  # to the end of step 1
    step: float  # median of the later steps


def run(shape: Shape, *, runs: int = 3, steps: int = 6, stage: int = 3, plain: bool = False) -> dict[str, list[Cost]]:
    """Measure, print the table, and return the cost of each way for each run.

    Args:
        runs: runs of each way, in turns.
        steps: steps in a run, at least 2.
        stage: the stage of ZeRO.
        plain: also measure our run without the rehearsal before step 1, which the Trainer does not have.

    Raises:
        RuntimeError: a rank failed. The message ends with the last lines that it printed.
    """
    ways = {TRAINER: None, OURS: list[str](), **({PLAIN: ["train.sanity_step=false"]} if plain else {})}
    found: dict[str, list[Cost]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, overrides in ways.items():
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place).resolve()
                job: dict[str, Any] = {"folder": str(folder), "shape": asdict(shape), "steps": steps, "stage": stage}
                if overrides is not None:
                    job = {"recipe": _recipe(folder, shape, steps, stage), "overrides": overrides}
                found[way].append(_cost(job, folder))
    print(_table(found, shape, steps, stage))
    return found


def _recipe(folder: Path, shape: Shape, steps: int, stage: int) -> str:
    """Write the recipe of our run and its shards. It has default settings, except where two small ranks need others."""
    overrides = [*("model.pondering_steps=0", "train.recompute=none", "train.precision=fp32"), f"train.steps={steps}"]
    recipe = folder / "recipe.yaml"
    recipe.write_text(to_yaml(_config(folder, shape, steps, [*overrides, f"train.deepspeed=zero{stage}"])))
    return str(recipe)


def tiny_run(folder: Path, stage: int, *, toy: bool, bf16: bool) -> RunConfig:
    """A run of four steps on one rank with pondering, and its shards, in a new folder."""
    folder.mkdir()
    shape = Shape(64, 2, 300, 32) if toy else Shape()
    overrides = [f"train.deepspeed=zero{stage}", f"train.precision={'bf16' if bf16 else 'fp32'}", "train.steps=4"]
    return _config(folder, shape, 4, [*overrides, "model.pondering_steps=3", "log.every_steps=1"])


def _config(folder: Path, shape: Shape, steps: int, overrides: Sequence[str]) -> RunConfig:
    make_shards(folder / "shards", 1, vocabulary=shape.vocabulary, tokens=16 * (RANKS * steps + 2) * shape.length)
    model = [f"model.{key}={value}" for key, value in shape.model.items()]
    data = [f"run_dir={folder / 'run'}", f"data.sources.all.path={folder / 'shards'}", f"data.seq_len={shape.length}"]
    batch = [f"train.global_batch={RANKS}", "train.micro_batch=1", "evaluate.sequences=2", "optim.schedule=constant"]
    return load(RunConfig, None, [*data, *model, *batch, *overrides])


def _cost(job: dict[str, Any], folder: Path) -> Cost:
    """The cost of one run in fresh processes."""
    shared = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    readings = [folder / f"readings-{rank}" for rank in range(RANKS)]
    said = [folder / f"said-{rank}" for rank in range(RANKS)]
    ranks = []
    for rank in range(RANKS):
        command = [sys.executable, "-W", "ignore", *RANK, json.dumps(job), str(readings[rank])]
        environment = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        assert environment.keys() >= set(RANK_VARIABLES)
        with said[rank].open("w") as out:
            ranks.append(subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT))
    while any(process.poll() is None for process in ranks) and not any(process.poll() for process in ranks):
        time.sleep(WAITS)
    for process in ranks:  # ends the other rank if one has failed
        process.kill()
    failed = [number for number, process in enumerate(ranks) if process.wait() > 0]
    if failed:
        raise RuntimeError(f"rank {failed[0]} failed: {said[failed[0]].read_text()[-2000:]}")
    sums = [sum(both) for both in zip(*(json.loads(path.read_text()) for path in readings), strict=True)]
    return Cost(sums[0], statistics.median(after - before for before, after in itertools.pairwise(sums)))


def _table(found: dict[str, list[Cost]], shape: Shape, steps: int, stage: int) -> str:
    medians = {
        way: Cost(statistics.median(cost.start for cost in costs), statistics.median(cost.step for cost in costs))
        for way, costs in found.items()
    }
    base = medians[TRAINER]
    lines = [
        f"llama D {shape.hidden}, L {shape.layers}, V {shape.vocabulary}, S = 0, "
        f"ZeRO-{stage}, {RANKS} gloo ranks of 1 x {shape.length} tokens, fp32, {steps} steps; "
        f"processor seconds of both ranks, medians of {len(found[TRAINER])} interleaved runs; ratios to {TRAINER}",
        f"{'':36s} {'to step 1':>10s} {'ratio':>6s} {'a step':>8s} {'ratio':>6s}",
    ]
    lines += [
        f"{way:36s} {cost.start:10.2f} {cost.start / base.start:6.2f} {cost.step:8.2f} {cost.step / base.step:6.2f}"
        for way, cost in medians.items()
    ]
    return "\n".join(lines)


def _on_a_rank(job: dict[str, Any], out: Path) -> None:
    """Train as one rank, and write its readings."""
    ours = "recipe" in job
    if ours:
        gc.disable()  # the command does so before it loads anything, but here the engine is loaded first to be watched
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine

    # Loading this compiles it if it is not cached, which takes a minute. Our run never loads it, so both ways go
    # without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    readings: list[float] = []
    step = DeepSpeedEngine.step

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        result = step(self, *arguments, **options)
        if self.was_step_applied():  # the rehearsal's step is not applied
            used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
            readings.append(sum(each.ru_utime + each.ru_stime for each in used))
            out.write_text(json.dumps(readings))
        return result

    DeepSpeedEngine.step = watched
    if ours:
        from ponder_scale.cli import main

        main(["train", job["recipe"], *job["overrides"]])
    _by_trainer(job)
    os._exit(0)  # DeepSpeed's threads may abort an interpreter that exits normally


def _by_trainer(job: dict[str, Any]) -> None:
    """Train as a user of the Trainer would."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from ponder_scale.train.zero.deepspeed_config import read_sharding

    shape = Shape(**job["shape"])
    rows = torch.randint(0, shape.vocabulary, (RANKS * job["steps"], shape.length))
    arguments = TrainingArguments(
        job["folder"],
        deepspeed={
            "zero_optimization": read_sharding(f"zero{job['stage']}")["zero_optimization"],
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
        },
        per_device_train_batch_size=1,
        max_steps=job["steps"],
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo",
        disable_tqdm=True,
        save_strategy="no",
    )
    model = LlamaForCausalLM(LlamaConfig(**shape.model, max_position_embeddings=shape.length))
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows]).train()


if __name__ == "__main__":
    _on_a_rank(json.loads(sys.argv[1]), Path(sys.argv[2]))
