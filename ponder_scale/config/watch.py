"""The knobs of checkpoints, evaluation, health checks and logs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ponder_scale.errors import ConfigError
from ponder_scale.settings import knob

from .bounds import MOST_POSITIONS, MOST_SECONDS, MOST_SEQUENCES, MOST_STEPS


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save checkpoints, and which ones to keep. The last step is always saved."""

    every_steps: int | None = knob(
        None,
        "Save a checkpoint at each step that is a multiple of this number. `null` does not save by steps.",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    every_minutes: float | None = knob(
        None,
        "Save when this many minutes have passed since the last save. `null` does not save by time.",
        above=0,
        max=1e6,
    )
    milestones: list[int] = knob([], "Save at these steps and keep those checkpoints forever.", min=1, max=MOST_STEPS)
    keep: int | None = knob(3, "Keep this many of the newest checkpoints. `null` keeps all.", min=1, max=10**6)
    keep_every: int | None = knob(
        None, "Keep every checkpoint whose step is a multiple of this, forever.", unit="steps", min=1, max=MOST_STEPS
    )
    asynchronous: bool = knob(
        False, "Train on while a copy of the state is written in the background. The copy takes host memory."
    )

    def __post_init__(self) -> None:
        if self.keep_every and self.every_steps and self.keep_every % self.every_steps:
            raise ConfigError(
                f"checkpoint.keep_every is {self.keep_every}; expected a multiple of checkpoint.every_steps "
                f"({self.every_steps}): only what is saved can be kept"
            )


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out perplexity of every pass during training, and downstream tasks."""

    every_steps: int | None = knob(
        None,
        "Evaluate at each step that is a multiple of this number. `null` evaluates only after the last step.",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    sequences: int = knob(
        256,
        "Held-out sequences to read from each source. A source with fewer uses all of them.",
        unit="sequences",
        min=1,
        max=10**9,
    )
    tasks: list[str] = knob([], "Tasks of lm-evaluation-harness to ask the model while it trains. [] asks none.")
    tasks_every_steps: int | None = knob(
        None,
        "Ask the tasks at each step that is a multiple of this number. `null` asks only after the last step.",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    tasks_include: str | None = knob(
        None,
        "Folder of task files with their data. `null` uses the harness's own tasks, whose data come from the hub.",
        path=True,
    )
    tasks_limit: int | None = knob(
        None, "Documents to ask of each task. `null` asks all.", unit="documents", min=1, max=10**9
    )
    tasks_batch: int = knob(
        8, "Requests of the tasks in one forward of one rank.", unit="requests", min=1, max=MOST_SEQUENCES
    )

    def __post_init__(self) -> None:
        for key in ("tasks_every_steps", "tasks_include", "tasks_limit"):
            if not self.tasks and (value := getattr(self, key)) is not None:
                raise ConfigError(
                    f"evaluate.{key} is {value} and evaluate.tasks is empty; name tasks, or leave it null"
                )


@dataclass(frozen=True)
class HealthConfig:
    """What a run watches while it trains, and how it reacts. docs/recovery.md says more."""

    hang_seconds: float | None = knob(
        600.0,
        "After this long without progress, print the stacks of every rank and exit with 86. `null` "
        "disables the watchdog.",
        unit="seconds",
        above=0,
        max=MOST_SECONDS,
    )
    slow_seconds: float = knob(
        3600.0,
        "The limit in place of `hang_seconds` during start-up, the first step, saves and evaluations.",
        unit="seconds",
        above=0,
        max=MOST_SECONDS,
    )
    max_skips: int = knob(
        8,
        "Skip at most this many steps in a row that are not finite or are spikes. The next one ends the run with exit "
        "code 87.",
        min=0,
        max=10**6,
    )
    spike_sigma: float | None = knob(
        6.0,
        "A loss or gradient norm is a spike if it is this many standard deviations above its mean. `null` "
        "disables the check.",
        above=0,
        max=1e6,
    )
    spike_window: int = knob(
        128,
        "Mean and deviation for `spike_sigma` are over this many steps. The check begins after half of them.",
        unit="steps",
        min=4,
        max=10**6,
    )
    on_spike: Literal["warn", "skip", "rewind"] = knob(
        "warn",
        "What to do about a spike. warn: record it. skip: drop the update. rewind: go back to the last "
        "checkpoint and leave out the data that led to the spike.",
    )
    rewind_skip_steps: int = knob(
        100,
        "A rewind leaves out the data of this many steps: the spike and those before it. It never leaves out data from "
        "before the checkpoint.",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    max_rewinds: int = knob(
        3, "Rewind at most this often. The next spike ends the run with exit code 87.", min=0, max=10**6
    )
    check_replicas_every: int | None = knob(
        100,
        "Compare the weights of all ranks at each step that is a multiple of this number. They must be equal. `null` "
        "disables the check.",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    straggler_factor: float | None = knob(
        1.5,
        "Log a straggler event when one rank spends more than this multiple of the median time in a "
        "phase. `null` disables it.",
        above=1,
        max=1e6,
    )


@dataclass(frozen=True)
class LogConfig:
    """What a run logs besides metrics.jsonl, which it always writes."""

    every_steps: int = knob(
        10,
        "Write a line of metrics at each step that is a multiple of this number.",
        unit="steps",
        min=1,
        max=MOST_STEPS,
    )
    wandb: Literal["off", "online", "offline"] = knob("off", "Report to Weights & Biases.")
    wandb_project: str = knob("ponder-scale", "Project name in Weights & Biases.")
    tensorboard: bool = knob(False, "Write TensorBoard event files to RUN/tensorboard. Needs the tensorboard package.")
    communication: bool = knob(
        False, "Measure the share of time in collectives with a profiler. Logged steps get slower."
    )
    profile_steps: list[int] = knob(
        [],
        "Trace the steps [first, last] with the profiler of torch into RUN/profile. [] traces none.",
        min=0,
        max=MOST_STEPS,
    )
    profile_ranks: list[int] = knob([0], "Ranks to trace.", min=0, max=10**6)
    track_tokens: int = knob(
        64,
        "Tokens of each micro-batch on which a logged step measures how much each pass changes.",
        unit="tokens",
        min=1,
        max=MOST_POSITIONS,
    )

    def __post_init__(self) -> None:
        steps = self.profile_steps
        if steps and (len(steps) != 2 or not 1 <= steps[0] <= steps[1]):
            raise ConfigError(f"log.profile_steps is {steps}; expected [first, last] with 1 <= first <= last, or []")
