"""Before step 1, rehearse a step and a save at full size, and drop the result.

A run usually runs out of memory at the highest number of pondering steps and the second micro-batch. A full or
read-only disk shows at the first save. Both may come hours into a run, when nobody looks. The rehearsal finds them in
the first minute.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ponder_scale import figures
from ponder_scale.config import RunConfig
from ponder_scale.data.sequences import MicroBatch
from ponder_scale.errors import CheckpointError, ConfigError, SaveError, UnhealthyError
from ponder_scale.train.schedules import trained_losses
from ponder_scale.train.state import RunState
from ponder_scale.train.zero.engine import Engine

logger = logging.getLogger(__name__)

COUNTERS = ("micro_steps", "global_steps", "global_samples", "skipped_steps")  # of DeepSpeed's engine


def rehearse(engine: Engine, config: RunConfig, vocab_size: int) -> None:
    """Run forward and backward at the real shapes with the most pondering steps, without an update. Collective.

    Two micro-batches are enough, because the second one already accumulates gradients. Nothing remains of the
    rehearsal: the gate refuses the update and drops all gradients, the counters are restored, and each step seeds the
    random numbers again.

    Raises:
        ConfigError: a device has not enough memory.
        UnhealthyError: the loss or the gradient of the initial weights is not finite.
    """
    deepspeed = engine.deepspeed
    counters = {name: getattr(deepspeed, name) for name in COUNTERS}
    length, count = config.data.seq_len, min(2, engine.micro_steps)
    tokens = torch.arange(config.train.micro_batch_sequences * (length + 1)).view(-1, length + 1) % vocab_size
    positions = torch.arange(length).expand(len(tokens), -1).contiguous() if config.data.document_mask else None
    batch, norms = MicroBatch(tokens, tokens[:, 1:], positions), list[float]()
    steps = config.model.pondering_steps
    learned = trained_losses(1, steps, config)

    def refuse(norm: float) -> bool:
        norms.append(norm)
        return False

    engine.set_batch(count * config.train.micro_batch_sequences * engine.world_size)
    try:
        for _ in range(count):
            output = engine.micro_step(batch, steps, track=config.log.track_tokens, **learned)
        engine.update(refuse)
    except torch.OutOfMemoryError as error:
        raise ConfigError(_out_of_memory(engine, config, error)) from error
    engine.set_batch(config.train.global_batch)
    for name, value in counters.items():
        setattr(deepspeed, name, value)
    if not math.isfinite(norms[0]):
        raise UnhealthyError(f"the initial weights give loss {output.loss.item()} and gradient norm {norms[0]}")


def trial_save(run_dir: Path, config: RunConfig, state: RunState) -> float:
    """Save a checkpoint of full size under a hidden name and delete it again. Returns the seconds. Collective.

    Raises:
        CheckpointError: a rank could not save.
    """
    began = time.monotonic()
    try:
        needed = state.trial()
    except SaveError as error:
        raise CheckpointError(f"a checkpoint cannot be saved in {run_dir}: {error}; {error.remedy}") from error
    free, wanted = shutil.disk_usage(run_dir).free, needed * ((config.checkpoint.keep or 1) + 1)
    if free < wanted and dist.get_rank() == 0:
        logger.warning(
            "a checkpoint takes %s; checkpoint.keep needs %s while saving, but the disk of %s has only %s",
            *(figures.size(needed), figures.size(wanted), run_dir, figures.size(free)),
        )
    return time.monotonic() - began


def _out_of_memory(engine: Engine, config: RunConfig, error: BaseException) -> str:
    train = config.train
    return (
        f"rank {engine.rank} has not enough memory for a step ({' '.join(str(error).split())[:120]}); lower "
        f"train.micro_batch ({train.micro_batch}), let train.recompute ({train.recompute}) keep less, "
        f"or see `ponder-scale plan`"
    )
