"""Write the metrics of a run: to metrics.jsonl, to the console, and to the trackers that the recipe asks for.

metrics.jsonl is the record of the run. The module `records` describes its contents.
"""

from __future__ import annotations

import logging
import operator
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ponder_scale.config import RunConfig
from ponder_scale.data.heldout import HeldOut, mean_over
from ponder_scale.harness.find import Scores
from ponder_scale.runs.records import Recorder
from ponder_scale.train.console import evaluation_lines, folded, step_line, tasks_lines
from ponder_scale.train.measure.throughput import Throughput
from ponder_scale.train.measure.trackers import open_trackers
from ponder_scale.train.measure.work import Work
from ponder_scale.train.schedules import pass_weights
from ponder_scale.train.survive.alarms import CollapseAlarms

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepMeans:
    """The report of a step over all ranks."""

    by_name: dict[str, list[float]]  # means over the labels; most lists have one mean for each pass
    labels: int  # fewer than the tokens if packed sequences are not full, or if the shards have a mask

    @property
    def pass_losses(self) -> list[float]:
        """The loss of each pass."""
        return self.by_name["pass_losses"]

    @property
    def loss(self) -> float:
        """The loss of the last pass, which is the one that is trained."""
        return self.pass_losses[-1]


class StepTally:
    """Adds up the reports of the micro-batches of one step on one rank, without waiting for the device."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._sums: Tensor | None = None
        self._weight = 0.0

    def add(self, output: Any, weight: float = 1.0) -> None:
        """Add a model output. `weight` is the number of labels that its means are over."""
        named = {"pass_losses": output.pass_losses, "pass_entropies": output.pass_entropies}
        for name in ("z_loss", "pass_shares", "halting_loss", "multi_token_losses"):
            if getattr(output, name) is not None:
                named[name] = getattr(output, name).reshape(-1)
        if output.changes is not None:
            named |= output.changes._asdict()
        self._sizes = {name: values.numel() for name, values in named.items()}
        values = torch.cat(list(named.values())) * weight
        self._sums = values if self._sums is None else self._sums + values
        self._weight += weight

    def sums(self) -> Tensor:
        """All sums, and the total weight as the last element: one flat tensor of the same length on every rank."""
        assert self._sums is not None
        return torch.cat([self._sums, torch.full((1,), self._weight, device=self._sums.device)])

    def means(self, total: Tensor) -> StepMeans:
        """The means, from `sums` added up over all ranks. They are 0 if no label counts."""
        *sums, weight = total.split([*self._sizes.values(), 1])
        divisor = weight + (weight == 0)
        by_name = {name: (part / divisor).tolist() for name, part in zip(self._sizes, sums, strict=True)}
        return StepMeans(by_name, int(weight))


class Metrics:
    """The metrics of a run. Rank 0 writes; on other ranks every method does nothing.

    Args:
        start_step: steps done before this attempt. Records of later steps are removed from metrics.jsonl.
        attempt: number of this start of the run, counted from 1.
        check_owned: raises if another process has taken the run over. Called before anything is recorded.
        work: counts what the run has done.
        vocabulary: size of the model's vocabulary.
        peak: dense bf16 FLOP/s of all devices, or None if not known. MFU and HFU are not known then, either.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        *,
        start_step: int,
        active: bool,
        attempt: int = 1,
        check_owned: Callable[[], None] = lambda: None,
        work: Work,
        vocabulary: int,
        peak: float | None,
    ) -> None:
        self._config, self._active, self._work = config, active, work
        if not active:
            return
        self._throughput = Throughput(config, work, peak=peak)
        self._alarms = CollapseAlarms(config, vocabulary)
        self._recorder = Recorder(run_dir, start_step=start_step, attempt=attempt, check_owned=check_owned)
        self._trackers = open_trackers(config, run_dir, self._recorder, start_step=start_step)

    def has_evaluation(self, step: int) -> bool:
        """Whether earlier attempts have recorded the evaluation of a step. True on ranks that record nothing."""
        return not self._active or self._recorder.evaluated == step

    def has_tasks(self, step: int) -> bool:
        """Whether earlier attempts have recorded the tasks of a step. True on ranks that record nothing."""
        return not self._active or self._recorder.last_asked == step

    def log_event(self, event: str, step: int, **values: Any) -> None:
        """Record an event of `records.HISTORY` with plain values. It is on disk when this returns."""
        if self._active:
            self._recorder.write(event, step, **values)

    def log_step(
        self,
        step: int,
        means: StepMeans,
        *,
        grad_norm: float,
        lr: float,
        data_wait: float,
        communication: float | None = None,
    ) -> None:
        """Record a step.

        Args:
            data_wait: seconds that rank 0 has waited for data since this attempt began.
            communication: share of the step's time in collectives, or None if it was not measured.
        """
        if not self._active:
            return
        speed = self._throughput.since_last(step, data_wait)
        values: dict[str, Any] = {
            "pondering_steps": len(means.pass_losses) - 1,
            "loss": means.loss,
            **self._trained_loss(step, means.pass_losses),
            **{name: mean[0] if name in ("z_loss", "halting_loss") else mean for name, mean in means.by_name.items()},
            "labels": means.labels,
            "grad_norm": grad_norm,
            "lr": lr,
            **speed,
            "communication_share": communication,
            **memory(),
        }
        self._write("step", step, values)
        for alarm in self._alarms.of(step, means.by_name) if means.labels else ():
            self.log_event("alarm", step, **alarm)
            for line in folded(f"step {step}: {alarm['message']}"):
                logger.warning("%s", line)
        logger.info("%s", step_line(step, self._config.train.steps, values))

    def _trained_loss(self, step: int, losses: list[float]) -> dict[str, float]:
        """The weighted sum that the step minimized, where that is not the loss of the last pass."""
        weights = pass_weights(step, len(losses) - 1, self._config.train.pass_losses, self._config.seed)
        return {} if weights is None else {"trained_loss": sum(map(operator.mul, weights, losses))}

    def log_evaluation(self, step: int, sources: Mapping[str, HeldOut]) -> None:
        """Record held-out losses by source."""
        if not self._active or not sources:
            return
        mean = mean_over(sources.values())
        by_source = {name: _plain(found) for name, found in sources.items()}
        trained = {"trained_tokens": self._work.tokens, "trained_flops": self._work.flops}
        values = {**_plain(mean), **trained, "sources": by_source}
        self._write("evaluation", step, values)
        for name, found in [*sources.items(), *([("all", mean)] if len(sources) > 1 else [])]:
            last = None if found.bits_per_byte is None else found.bits_per_byte[-1]
            where = (step, self._config.train.steps, name)
            for line in evaluation_lines(*where, found.tokens, found.perplexities, last):
                logger.info("%s", line)

    def log_tasks(self, step: int, scores: Scores | None, failure: str | None, seconds: float) -> None:
        """Record the scores of the tasks, or why there are none."""
        if not self._active:
            return
        self._write("tasks", step, {"tasks": scores or {}, "failure": failure, "seconds": seconds})
        for line in tasks_lines(step, self._config.train.steps, scores or {}, failure, seconds):
            logger.log(logging.INFO if failure is None else logging.ERROR, "%s", line)

    def resume_clock(self, data_wait: float) -> None:
        """Leave the time since the last record out of the rates: the run did not train. `data_wait` as above."""
        if self._active:
            self._throughput.restart(data_wait)

    def sync(self) -> None:
        """Wait until the record is on disk. Called before a save, so that no checkpoint is ahead of the record."""
        if self._active:
            self._recorder.sync()

    def close(self) -> None:
        """Flush and close."""
        if self._active:
            self._recorder.close()
            for tracker in self._trackers:
                tracker.close()

    def _write(self, event: str, step: int, values: dict[str, Any]) -> None:
        self._recorder.write(event, step, **values)
        for tracker in self._trackers:
            tracker.log(event, step, values)


def _plain(found: HeldOut) -> dict[str, Any]:
    return {**asdict(found), "bits_per_byte": found.bits_per_byte}


def memory() -> dict[str, float]:
    """The memory of this process now and at its peak, in GiB: on the GPU if there is one, else resident memory."""
    if torch.cuda.is_available():
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        resident = Path("/proc/self/statm")  # counts pages; only Linux has it
        now = int(resident.read_text().split()[1]) * resource.getpagesize() if resident.is_file() else peak
    return {"memory_now_gib": now / 2**30, "memory_gib": peak / 2**30}
