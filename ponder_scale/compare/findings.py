"""Read what the runs of a comparison have measured, and give verdicts that claim no more than the seeds support."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ponder_scale.compare.baselines import VANILLA
from ponder_scale.compare.members import Member, Run
from ponder_scale.runs import records

# Two-sided 95% quantiles of Student's t for one to nine degrees of freedom. More degrees use the last, which is wider
# than necessary.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Result:
    """The measurements of a finished or running training.

    Args:
        curve: pairs of a step and the held-out loss of the last pass, until now.
        trained: by step, the tokens and FLOPs that the run had recorded by then. Runs of older versions have none.
        seconds: time of training, without evaluations and saves.
        held_out_tokens: number of tokens that the losses are means over.
        bits_per_byte: the last held-out loss in bits per byte, or None if the bytes of the tokens are not known.
    """

    run: Run
    curve: list[tuple[int, float]]
    seconds: float
    held_out_tokens: int
    finished: bool
    trained: dict[int, dict[str, float]] = field(default_factory=dict)
    bits_per_byte: float | None = None

    def amount(self, axis: str, step: int) -> float:
        """The tokens or FLOPs up to an evaluation, as recorded, or else computed from the recipe."""
        if step in self.trained:
            return self.trained[step][axis]
        member = self.run.member
        return {"tokens": member.tokens, "flops": member.flops}[axis] * member.share(step)

    @property
    def loss(self) -> float:
        """The last held-out loss, in nats. It is nan if it was not finite, or if nothing is held out."""
        return self.curve[-1][1] if self.curve else math.nan


@dataclass(frozen=True)
class Verdict:
    """A pondering model against a baseline, over the seeds that both have finished.

    Args:
        differences: by seed, the baseline's loss minus the pondering model's, in nats. Above 0, pondering is better.
        half_width: half of the 95% interval of their mean, or None for a single seed.
        ahead_from: tokens after which pondering is ahead at every evaluation of every seed. None if it is not ahead,
            or if the two were evaluated at different steps.
    """

    pondering: str
    baseline: str
    differences: list[float]
    half_width: float | None
    ahead_from: int | None

    def __str__(self) -> str:
        mean = statistics.fmean(self.differences)
        if not math.isfinite(mean):
            return (
                f"{self.pondering} against {self.baseline}: no difference is claimed, as a held-out loss is not finite"
            )
        way = "lower" if mean >= 0 else "higher"
        found = f"{self.pondering} against {self.baseline}: loss {way} by {abs(mean):+.4f} nats"
        if self.half_width is None:
            return f"{found} in one seed, so no difference is claimed; train at least 3 seeds"
        found += f" +- {self.half_width:.4f} (95% interval over {len(self.differences)} seeds)"
        if abs(mean) <= self.half_width:
            return f"{found}: the interval holds 0, so no difference is claimed"
        if mean < 0:
            return f"{found}: {self.baseline} is better"
        since = "" if self.ahead_from is None else f", at every evaluation from {self.ahead_from:,} tokens on"
        return f"{found}: {self.pondering} is better{since}"


def read_result(run: Run) -> Result | None:
    """The measurements of a run. None before its first evaluation, or before its end if nothing is held out."""
    path = run.run_dir / records.METRICS
    if not path.is_file():
        return None
    curve: list[tuple[int, float]] = []
    seconds, before, tokens = 0.0, 0, 0
    last, bits = 0, None
    trained: dict[int, dict[str, Any]] = {}
    for record in records.read(path):
        if record["event"] == "evaluation":
            loss = record["losses"][-1]  # null if it was not finite
            curve.append((record["step"], math.nan if loss is None else loss))
            tokens = record["tokens"]
            bits = (record.get("bits_per_byte") or [None])[-1]
            if "trained_tokens" in record:
                trained[record["step"]] = {axis: record[f"trained_{axis}"] for axis in ("tokens", "flops")}
        elif record["event"] == "step":
            seconds += record["seconds_per_step"] * (record["step"] - before)
            before = record["step"]
        last = max(last, record["step"] if record["event"] == "end" else 0)
    whole = last >= run.member.steps if not curve else curve[-1][0] == run.member.steps
    return Result(run, curve, seconds, tokens, whole, trained, bits) if curve or whole else None


def time_ratio(results: Sequence[Result]) -> float | None:
    """The training time of the first pondering model over vanilla's, for the first seed that has both.

    None until one seed has both.
    """
    finished = [result for result in results if result.finished and result.seconds > 0]
    ours = {result.run.seed: result.seconds for result in reversed(finished) if result.run.member.ponders}
    theirs = {result.run.seed: result.seconds for result in finished if result.run.member.name == VANILLA}
    return next((ours[seed] / seconds for seed, seconds in theirs.items() if seed in ours), None)


def verdicts(results: Sequence[Result]) -> list[Verdict]:
    """The verdicts on every pondering model against every baseline that have finished a common seed.

    There are none without held-out data.
    """
    members = members_of(results)
    finished = {(each.run.member.name, each.run.seed): each for each in results if each.finished and each.curve}
    found = []
    for pondering in (member for member in members if member.ponders):
        for baseline in (member for member in members if not member.ponders):
            pairs = [
                (finished[pondering.name, seed], other)
                for (name, seed), other in finished.items()
                if name == baseline.name and (pondering.name, seed) in finished
            ]
            if pairs:
                differences = [other.loss - ours.loss for ours, other in pairs]
                ahead = _ahead_from(pairs)
                found.append(Verdict(pondering.name, baseline.name, differences, half_width(differences), ahead))
    return found


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95% interval of a mean, by Student's t. None for a single value, and if a value is not finite."""
    if len(values) < 2 or not all(math.isfinite(value) for value in values):
        return None
    t = T_95[min(len(values) - 1, len(T_95)) - 1]
    return t * statistics.stdev(values) / math.sqrt(len(values))


def members_of(results: Sequence[Result]) -> list[Member]:
    """The members of the results, each once, in order."""
    return list({result.run.member.name: result.run.member for result in results}.values())


def _ahead_from(pairs: list[tuple[Result, Result]]) -> int | None:
    curves = [(dict(ours.curve), dict(other.curve)) for ours, other in pairs]
    if any(ours.keys() != other.keys() for ours, other in curves):
        return None
    ahead: int | None = None
    for step in sorted(curves[0][0]):
        if not all(ours[step] < other[step] for ours, other in curves):
            ahead = None
        elif ahead is None:
            ahead = step
    return None if ahead is None else round(max(ours.amount("tokens", ahead) for ours, _ in pairs))
