"""What changes from one optimizer step to the next: learning rate, pondering steps, weights of the passes' losses.

All are pure functions of the step, so a resumed run needs no state of theirs.
"""

from __future__ import annotations

import math
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ponder_scale.config import OptimConfig, PonderingSchedule, RunConfig
from ponder_scale.planning.depth import DEPTH_SIGMA
from ponder_scale.setup.build import ARCHITECTURES


def learning_rate(step: int, steps: int, optim: OptimConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 1 to `steps`.

    Linear warm-up reaches `lr` at step `warmup_steps`; the decay reaches `min_lr` at step `steps`. wsd stays at `lr`
    until `wsd_decay_steps` are left (arXiv 2404.06395; its shape 1 - sqrt: arXiv 2405.18392).
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    begin = steps - (optim.wsd_decay_steps or 0) if optim.schedule == "wsd" else optim.warmup_steps
    progress = max(0, step - begin) / max(1, steps - begin)
    minus_sqrt = optim.schedule == "wsd" and optim.wsd_decay_style == "minus_sqrt"
    shape = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "constant": 1.0,
        "wsd": 1.0 - (math.sqrt(progress) if minus_sqrt else progress),
    }[optim.schedule]
    return optim.min_lr + (optim.lr - optim.min_lr) * shape


def pass_weights(step: int, steps: int, pass_losses: str, seed: int) -> tuple[float, ...] | None:
    """The weights of the losses of passes 0 to `steps` in optimizer step `step`. They sum to 1.

    None stands for the last alone, and for exit. random draws one of the passes before the last, by seed and step
    alone, so it is the same on every rank. The drawn pass and the last count half each, as in the progressive loss of
    arXiv 2202.05826 with alpha 1/2. If the drawn pass counted alone, the passes after it would be computed for nothing.
    That would be `pondering.schedule=uniform`, which does not compute them.
    """
    if pass_losses in ("last", "exit"):  # the gates of exit weigh each token's losses
        return None
    if pass_losses == "random":
        weights = [0.0] * steps + [0.5 if steps else 1.0]
        if steps:
            weights[random.Random(f"pass losses {seed} {step}").randrange(steps)] = 0.5
        return tuple(weights)
    shares = [index + 1 if pass_losses == "linear" else 1 for index in range(steps + 1)]
    return tuple(share / sum(shares) for share in shares)


def halting_loss(step: int, config: RunConfig) -> tuple[float, float] | None:
    """The weight and the share of the loss of the gates in optimizer step `step`, counted from 1; None without gates.

    The share rises linearly and is reached at `warmup_steps`.
    """
    if config.model.halting == "none":
        return None
    loss = config.train.halting
    return loss.weight, loss.share * min(1.0, step / max(1, loss.warmup_steps))


def trained_losses(step: int, steps: int, config: RunConfig) -> dict[str, Any]:
    """The arguments of `Engine.micro_step` that say which losses optimizer step `step` trains, with S = `steps`."""
    return {
        "pass_weights": pass_weights(step, steps, config.train.pass_losses, config.seed),
        "halting_loss": halting_loss(step, config),
        "multi_token_weight": config.train.multi_token_weight if config.model.extra_heads else None,
    }


def pondering_steps(step: int, highest: int, schedule: PonderingSchedule, seed: int) -> int:
    """The pondering steps of optimizer step `step`, counted from 1; at most `highest`, the model's.

    uniform and lognormal-poisson draw from [low, highest], by seed and step alone: the same on every rank. ramp rises
    linearly and reaches `highest` at step `ramp_steps`.
    """
    if schedule.schedule == "fixed":
        return highest
    if schedule.schedule == "ramp":
        done = min(1.0, step / schedule.ramp_steps)
        return schedule.low + math.floor((highest - schedule.low) * done)
    return _drawn(random.Random(f"pondering steps {seed} {step}"), highest, schedule)


def refinements(step: int, config: RunConfig) -> int | None:
    """The Jacobi refinements of latents in optimizer step `step`; None without latents.

    They are drawn evenly by seed and step alone, from the range that the published code of the architecture has.
    """
    if config.model.feedback != "latent":
        return None
    fewest, most = ARCHITECTURES[config.model.architecture].configuration.published_refinements
    return random.Random(f"refinements {config.seed} {step}").randint(fewest, most)


class Depth(NamedTuple):
    """The pondering steps of an optimizer step."""

    most: int  # the most steps of a sequence, which is the number that runs for all
    by_sequence: list[int] | None = None  # in the order of the global batch; None: all take as many
    refinements: int | None = None  # of latents

    def of(self, micro_batch: int, rows: int, *, rank: int, ranks: int) -> Tensor | None:
        """Those of the sequences of a rank's micro-batch, (rows,), which the loader deals out; None: as many as all."""
        if self.by_sequence is None:
            return None
        first = (micro_batch * ranks + rank) * rows
        return torch.tensor(self.by_sequence[first : first + rows])


def step_depth(step: int, config: RunConfig) -> Depth:
    """The pondering steps of optimizer step `step` of a run, counted from 1.

    A sequence's own are drawn by seed, step and its place in the global batch, so that they depend on neither ranks
    nor micro-batches.
    """
    schedule, highest, seed = config.train.pondering, config.model.pondering_steps, config.seed
    if schedule.per == "step":
        return Depth(pondering_steps(step, highest, schedule, seed), refinements=refinements(step, config))
    places = range(config.train.batch_at(step))
    drawn = [_drawn(random.Random(f"pondering steps {seed} {step} {place}"), highest, schedule) for place in places]
    return Depth(max(drawn), drawn)


def _drawn(draw: random.Random, highest: int, schedule: PonderingSchedule) -> int:
    """A number of pondering steps in [low, highest].

    lognormal-poisson: Poisson(exp(tau)), tau ~ Normal(log(mean) - sigma^2 / 2, sigma), which has the mean `mean`,
    then clipped. Huginn (arXiv 2502.05171, section 3.3; `randomized_iteration_sampler` of its code) runs one iteration
    more than the Poisson number, and the model here one pass more than it has pondering steps.
    """
    if schedule.schedule == "uniform":
        return draw.randint(schedule.low, highest)
    assert schedule.mean is not None
    rate = draw.lognormvariate(math.log(schedule.mean) - DEPTH_SIGMA**2 / 2, DEPTH_SIGMA)
    # as many as arrive in a time of `rate`; no more than `highest` of them need be counted
    steps, time = 0, draw.expovariate(1.0)
    while time <= rate and steps < highest:
        steps, time = steps + 1, time + draw.expovariate(1.0)
    return max(schedule.low, steps)
