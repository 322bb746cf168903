"""Runs in the lab: submitted by the templates, followed by what they leave."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.slurm.lab import Lab

STEPS = 24
SHAPE = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=4",
    "model.pondering_steps=1",
    "data.seq_len=32",
    f"train.steps={STEPS}",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.precision=fp32",
    "train.time_limit=null",
    "train.sanity_step=false",
    "optim.lr=3e-3",
    "checkpoint.every_steps=8",
    "evaluate.sequences=4",
    "log.every_steps=1",
]
NO_GPUS = ("--gpus-per-node=0", "--cpus-per-task=1")


@dataclass
class Place:
    """What a scenario has: the cluster, a folder of its own, and shards."""

    lab: Lab
    folder: Path
    shards: Path
    corpus: Path
    tokenizer: Path
    reference: Callable[[], Run]


@dataclass
class Run:
    """A run and its job."""

    place: Place
    folder: Path
    job: str

    @property
    def log(self) -> str:
        """What the job script has said."""
        path = self.folder.with_suffix(".log")
        return path.read_text() if path.exists() else ""

    def rank_log(self, number: int, rank: int) -> str:
        """What a rank has said in an attempt, counted from 0."""
        path = self.folder / "logs" / f"{self.job}-{number}" / f"rank-{rank:04d}.log"
        return path.read_text() if path.exists() else ""

    def steps(self) -> list[dict[str, Any]]:
        """The records of the steps."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [record for record in map(json.loads, lines) if record["event"] == "step"]

    def losses(self) -> list[tuple[int, float]]:
        """Number and loss of each recorded step, in order."""
        return [(record["step"], record["loss"]) for record in self.steps()]

    def until_step(self, step: int) -> None:
        """Wait until a step has been recorded."""
        self.place.lab.until(lambda: any(r["step"] >= step for r in self.steps()), f"step {step} of {self.folder}")

    def until_said(self, text: str) -> None:
        """Wait until the job script has said something."""
        self.place.lab.until(lambda: re.search(text, self.log), f"{text!r} in {self.folder}.log")

    def ended(self) -> str:
        """Wait for the end of the job and return its state."""
        return self.place.lab.wait(self.job)

    def whole(self) -> list[int]:
        """Steps of the checkpoints."""
        return sorted(int(path.name.removeprefix("step-")) for path in (self.folder / "checkpoints").glob("step-*"))


def train(
    place: Place, *more: str, nodes: int = 2, sbatch: tuple[str, ...] = ("--exclusive",), name: str = "run", **env: str
) -> Run:
    """Submit a run of the real trainer."""
    folder = place.folder / name
    options = [f"--nodes={nodes}", "--ntasks-per-node=1", *NO_GPUS, f"--output={folder}.log", *sbatch]
    recipe = place.folder / f"{name}.yaml"
    recipe.write_text(f"run_dir: {json.dumps(str(folder))}\n")
    words = [f"data.sources.texts.path={place.shards}", *SHAPE, *more]
    env = {"TRAINER": "faulty", "FAULT_DONE": str(folder) + ".fault", **env}
    return Run(place, folder, place.lab.sbatch(*options, "slurm/train.sbatch", recipe, *words, **env))


def count(
    place: Place, *more: str, nodes: int = 2, sbatch: tuple[str, ...] = ("--exclusive",), name: str = "run", **env: str
) -> Run:
    """Submit a run of the stand-in."""
    folder = place.folder / name
    options = [f"--nodes={nodes}", "--ntasks-per-node=1", *NO_GPUS, f"--output={folder}.log", *sbatch]
    job = place.lab.sbatch(*options, "slurm/train.sbatch", "-", f"run_dir={folder}", *more, TRAINER="contract", **env)
    return Run(place, folder, job)


def hosts(run: Run) -> list[str]:
    """The nodes of each attempt."""
    return re.findall(r"trains on (\S+), logs", run.log)
