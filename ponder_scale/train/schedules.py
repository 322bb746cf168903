"""What changes from one optimizer step to the next: learning rate, pondering steps, weights of the passes' losses.

All are pure functions of the step, so a resumed run needs no state of theirs.
"""

from __future__ import annotations

import math
import random

from ponder_scale.config import OptimConfig, PonderingSchedule


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
    """The weights of the losses of passes 0 to `steps` in optimizer step `step`. They sum to 1. None: the last alone.

    random draws one of the passes before the last, by seed and step alone, so it is the same on every rank. The drawn
    pass and the last count half each, as in the progressive loss of arXiv 2202.05826 with alpha 1/2. If the drawn pass
    counted alone, the passes after it would be computed for nothing. That would be `pondering.schedule=uniform`, which
    does not compute them.
    """
    if pass_losses == "last":
        return None
    if pass_losses == "random":
        weights = [0.0] * steps + [0.5 if steps else 1.0]
        if steps:
            weights[random.Random(f"pass losses {seed} {step}").randrange(steps)] = 0.5
        return tuple(weights)
    shares = [index + 1 if pass_losses == "linear" else 1 for index in range(steps + 1)]
    return tuple(share / sum(shares) for share in shares)


def pondering_steps(step: int, highest: int, schedule: PonderingSchedule, seed: int) -> int:
    """The pondering steps of optimizer step `step`, counted from 1; at most `highest`, the model's.

    uniform draws from [low, highest], by seed and step alone: the same on every rank. ramp rises linearly and
    reaches `highest` at step `ramp_steps`.
    """
    if schedule.schedule == "fixed":
        return highest
    if schedule.schedule == "uniform":
        return random.Random(f"pondering steps {seed} {step}").randint(schedule.low, highest)
    done = min(1.0, step / schedule.ramp_steps) if schedule.ramp_steps else 1.0
    return schedule.low + math.floor((highest - schedule.low) * done)
