"""`python -m benchmarks planner` compares the time of a step that the planner predicts with the measured one.

Two ranks on this machine train eight small models under the real engine. Each round calibrates the machine anew and
predicts by this calibration, so a machine that is slower for a while is slower in both. The ratio of a configuration is
the median over the rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch

from benchmarks.start import Shape
from benchmarks.two_ranks import RANKS, configuration_of, on_two_ranks
from ponder_scale.config import RunConfig
from ponder_scale.errors import ConfigError
from ponder_scale.planning.calibrate import calibrate
from ponder_scale.planning.hardware import Hardware
from ponder_scale.planning.plan import Devices, plan_run, settle_sharding
from ponder_scale.planning.time import StepTime
from ponder_scale.settings import load

VOCABULARY = 4096
WARM_UP = 2  # steps before the first that is timed: DeepSpeed records its trace, AdamW makes its moments


@dataclass(frozen=True)
class Case:
    """A run whose step is timed."""

    sharding: str
    policy: str
    pondering_steps: int
    hidden: int
    layers: int
    length: int  # tokens of a sequence, one of which is a micro-batch
    micro_steps: int = 1

    @property
    def name(self) -> str:
        """The columns of the table."""
        shape = f"{self.hidden:5d} {self.layers:2d} {self.pondering_steps:2d} {self.length:4d} x {self.micro_steps}"
        return f"{self.sharding:20s} {self.policy:10s} {shape}"

    def overrides(self) -> list[str]:
        """The settings of the run."""
        model = Shape(self.hidden, self.layers, VOCABULARY).model | {"pondering_steps": self.pondering_steps}
        train = {
            "steps": 100,
            "global_batch": RANKS * self.micro_steps,
            "micro_batch": 1,
            "precision": "fp32",
            "deepspeed": self.sharding,
            "recompute": self.policy,
        }
        settings = [f"model.{key}={value}" for key, value in model.items()]
        settings += [f"train.{key}={value}" for key, value in train.items()]
        return ["run_dir=unused", "data.sources.any.path=unused", f"data.seq_len={self.length}", *settings]


CASES = (
    Case("zero0", "none", 1, 256, 6, 512),
    Case("zero1", "none", 3, 256, 6, 512),
    Case("zero1", "selective", 1, 512, 4, 256, micro_steps=2),
    Case("zero2", "pass", 3, 256, 6, 512),
    Case("zero3_keep_gathered", "none", 3, 384, 6, 256),
    Case("zero3_keep_gathered", "pass", 2, 512, 4, 256),
    Case("zero3_bounded", "layer", 3, 384, 6, 256),
    Case("zero3_bounded", "none", 0, 512, 4, 512, micro_steps=2),
)


def run(
    *,
    rounds: int = 3,
    steps: int = 4,
    within: float = 0.15,
    cases: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
) -> int:
    """Measure, print the table, and return 1 if a ratio is further from 1 than `within`, else 0.

    Args:
        rounds: calibrations, each of which is followed by every case.
        steps: steps that are timed in each run.
        cases: numbers of some cases, from 1 on. The default is all.
        overrides: settings for every case.
    """
    wrong = [number for number in cases or () if not 1 <= number <= len(CASES)]
    if wrong:
        raise ConfigError(f"--cases {wrong[0]}: expected numbers from 1 to {len(CASES)}")
    chosen = [CASES[number - 1] for number in cases] if cases else list(CASES)
    runs = [[*case.overrides(), *overrides] for case in chosen]
    measured: list[tuple[Hardware, list[float]]] = []
    for _ in range(rounds):
        hardware = calibrate()
        measured.append((hardware, [on_two_ranks(partial(step_seconds, steps=steps), settings) for settings in runs]))
    print(f"seconds of a step on {RANKS} ranks, fp32: the medians of {rounds} rounds of {steps} steps")
    print(f"{'sharding':20s} {'policy':10s} {'D':>5s} {'L':>2s} {'S':>2s} {'tokens':>8s}", end="")
    print(f" {'measured':>9s} {'planned':>9s} {'ratio':>6s}   planned terms")
    worst = 0.0
    for index, (case, settings) in enumerate(zip(chosen, runs, strict=True)):
        planned = [predicted(settings, hardware) for hardware, _ in measured]
        seconds = [found[index] for _, found in measured]
        ratio = statistics.median(plan.seconds / real for plan, real in zip(planned, seconds, strict=True))
        worst = max(worst, abs(ratio - 1))
        plan = StepTime(*(statistics.median(getattr(p, entry.name) for p in planned) for entry in fields(StepTime)))
        times = f"{statistics.median(seconds):9.3f} {plan.seconds:9.3f} {ratio:6.2f}"
        print(f"{case.name} {times}   {plan.sentence}", flush=True)
    return int(worst > within)


def predicted(settings: Sequence[str], hardware: Hardware) -> StepTime:
    """The planner's time of a step of this run on two ranks of `hardware`."""
    from ponder_scale.train.zero.deepspeed_config import read_sharding

    config = load(RunConfig, None, settings)
    configuration = configuration_of(config)
    devices = Devices(RANKS, round(hardware.memory_bytes), RANKS, gpu=False, hardware=hardware)
    sharding = settle_sharding(config, read_sharding(config.train.deepspeed), configuration, devices)
    return plan_run(config, sharding, configuration, devices).step


def step_seconds(engine: Any, config: RunConfig, steps: int) -> float:
    """The median of the seconds of some steps under an engine."""
    from ponder_scale.data.sequences import MicroBatch

    tokens = torch.randint(0, config.model.vocab_size or 0, (1, config.data.seq_len + 1))
    spent = []
    for _ in range(WARM_UP + steps):
        torch.distributed.barrier()
        begin = time.perf_counter()
        for _ in range(engine.micro_steps):
            engine.micro_step(MicroBatch(tokens, tokens[:, 1:], None))
        engine.update()
        spent.append(time.perf_counter() - begin)
    return statistics.median(spent[WARM_UP:])
