"""The training loop."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ponder_scale.config import RunConfig
from ponder_scale.data.heldout import loss_sums, of_sums
from ponder_scale.data.loader import heldout_batches
from ponder_scale.data.sequences import IGNORE_INDEX, MicroBatch
from ponder_scale.errors import REWOUND, ConfigError
from ponder_scale.runs.attempts import Attempt
from ponder_scale.train import generators
from ponder_scale.train.measure.metrics import StepMeans, StepTally
from ponder_scale.train.schedules import Depth, learning_rate, step_depth, trained_losses
from ponder_scale.train.start import Run, start
from ponder_scale.train.survive.control import Orders
from ponder_scale.train.survive.watchdog import Watch

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> int:
    """Train the run to its last step, from its newest whole checkpoint if it has one. Every rank calls it.

    Returns the exit code. It is 0, or the code of the order that ended the run earlier: a signal, a request file or
    the time limit.
    """
    run_dir, rank = Path(config.run_dir), int(os.environ.get("RANK", "0"))
    attempt = Attempt(run_dir)
    with Watch(run_dir, config.health, rank=rank, check_owned=attempt.check_owned) as watch:
        run = start(config, watch, attempt)
        try:
            return _train(run)
        except Exception:
            run.watch.failing()
            run.state.abandon()  # a save that is still being written in the background must not be lost
            raise


def _train(run: Run) -> int:
    """The loop: forward and backward, agreement, update, log, save, evaluate."""
    config = run.config
    gc.freeze()  # keeps startup objects out of garbage collection, where a pass on one rank would stall all others
    gc.enable()
    if refusal := run.engine.agreed(run.control.refusal()):
        raise ConfigError(refusal)
    orders = run.control.orders(run.engine.total(_wishes(run)).tolist())  # a signal may have come during the start
    step = run.first_step - 1
    due = step > 0 and (step == config.train.steps or _due(step, config.evaluate.every_steps))
    if due and not orders.stop and not run.engine.agreed(run.metrics.has_evaluation(step)):
        _evaluate(run, step)  # the attempt before ended between the save and the evaluation of this step
    due = step > 0 and (step == config.train.steps or _due(step, config.evaluate.tasks_every_steps))
    if due and not orders.stop and not run.engine.agreed(run.metrics.has_tasks(step)):
        _ask_tasks(run, step)
    run.metrics.resume_clock(run.loader.wait_seconds)
    while step < config.train.steps and not orders.stop:
        step, began = step + 1, run.watch.clock()
        run.watch.enter("data", step)
        run.incidents.begin_step()
        lr = learning_rate(step, config.train.steps, config.optim)
        run.engine.set_learning_rate(lr)
        depth = step_depth(step, config)
        if config.train.pondering.schedule != "fixed":
            run.engine.agree_on(depth.most)
        last = step == config.train.steps
        logged = step == run.first_step or last or step % config.log.every_steps == 0
        with run.profiler.step(step, logged=logged) as communication:
            tally = _accumulate(run, step, depth, logged=logged)
            run.watch.enter("step")
            means, orders = _agree(run, tally)
            if _due(step, config.health.check_replicas_every):
                run.incidents.compare_replicas(step)
            grad_norm = run.engine.update(partial(run.health.accepts, means.loss, labels=means.labels))
            run.engine.average_weights(step)
        run.work.add(config.train.batch_at(step), depth.most, depth.refinements, updated=run.engine.updated)
        run.control.took(step=run.watch.clock() - began)
        if logged:
            run.metrics.log_step(
                step,
                means,
                grad_norm=grad_norm,
                lr=lr,
                data_wait=run.loader.wait_seconds,
                communication=communication.share,
            )
            run.incidents.name_straggler(step, run.watch, first=step == run.first_step)
        if run.health.finding is not None and run.incidents.treat(step, tally):
            return _end(run, step - 1, orders, rewound=True)
        if reason := run.state.due(step) or (orders.save and orders.reason):
            _save(run, step, reason)
        if last or (_due(step, config.evaluate.every_steps) and not orders.stop):
            _evaluate(run, step)
        if last or (_due(step, config.evaluate.tasks_every_steps) and not orders.stop):
            _ask_tasks(run, step)
        run.state.poll()
        run.control.done(orders)
    return _end(run, step, orders)


def _accumulate(run: Run, step: int, depth: Depth, *, logged: bool) -> StepTally:
    """Run forward and backward of the micro-batches of a step. Returns what they report."""
    tally = StepTally()
    generators.seed(run.config.seed, step, run.engine.rank)
    extras: dict[str, Any] = {"track": run.config.log.track_tokens if logged else None}
    extras |= {"refinements": depth.refinements, **trained_losses(step, depth.most, run.config)}
    sequences, ahead = (run.config.train.batch_at(number) for number in (step, step + 1))
    run.engine.set_batch(sequences)
    batches = run.loader.next_batches(sequences, ahead)
    counts = [int((batch.labels != IGNORE_INDEX).sum()) for batch in batches]
    if run.config.data.packing == "best-fit" or any(shards.manifest.masked for shards in run.sources.values()):
        # Batches have different numbers of labels that count. Dividing all by the same mean gives each label the same
        # weight in the step. The mean may be 0.
        mean = run.engine.mean(counts)
        extras["label_count"] = torch.where(mean > 0, mean, 1.0)
    for number, (batch, count) in enumerate(zip(batches, counts, strict=True)):
        own = depth.of(number, len(batch.tokens), rank=run.engine.rank, ranks=run.engine.world_size)
        tally.add(run.engine.micro_step(batch, depth.most, own, enter=run.watch.enter, **extras), count)
    return tally


def _agree(run: Run, tally: StepTally) -> tuple[StepMeans, Orders]:
    """Add up, in one all-reduce, the reports of all ranks' micro-batches and what each rank wants to happen next."""
    sums, wishes = run.engine.totals(tally.sums(), _wishes(run))
    return tally.means(sums), run.control.orders(wishes.tolist())


def _wishes(run: Run) -> torch.Tensor:
    return torch.tensor(run.control.wishes(late=run.state.late()), device=run.engine.device)


def _end(run: Run, step: int, orders: Orders, *, rewound: bool = False) -> int:
    """Close everything. Ranks leave together, because a launcher may end the others as soon as the first leaves.

    Args:
        step: the last step that is done.
        rewound: the step after it was rejected. It is not saved, and the next attempt goes back to the checkpoint.
    """
    saved, complete = orders.save and not rewound, step >= run.config.train.steps
    if complete:
        reason, code = "done", 0
    elif rewound and not orders.stop:
        reason, code = "a rewind", REWOUND
    else:
        reason, code = orders.reason, orders.exit_code or 0
    if not complete:
        logger.info("ended at step %d by %s%s", step, reason, "" if saved else ", without saving")
    if orders.stop or not rewound:  # after a rewind, the next attempt still has to honour a request to save
        run.control.done(orders)
    run.watch.enter("save")  # an asynchronous save may still be running
    run.state.close()
    run.metrics.log_event("end", step, reason=reason, exit_code=code)
    run.profiler.close()
    run.loader.close()
    run.metrics.close()
    dist.barrier()
    return code


def _evaluate(run: Run, step: int) -> None:
    """Measure the held-out losses after a step. If this fails, save the step before the run ends. Collective."""
    run.watch.enter("evaluate")
    began = run.watch.clock()
    sums: dict[str, torch.Tensor] = {}
    failure: Exception | None = None
    try:
        for name in run.sources:
            found = loss_sums(run.engine.predict, _heldout(run, name), run.watch.alive, sizes=run.sizes)
            if found is not None:
                sums[name] = found
    except Exception as error:
        logger.exception("step %d: the evaluation failed on rank %d; saving the step", step, run.engine.rank)
        failure = error
    if failure is not None and run.engine.zero_stage == 3:
        # If only this rank failed, the others wait in a gather. The limit of "step" ends that sooner than "evaluate".
        run.watch.enter("step")
    if run.engine.total(torch.tensor(float(failure is not None))):
        _save(run, step, "a failed evaluation")
        raise failure or RuntimeError(f"step {step}: the evaluation failed on another rank; see its log")
    losses = {name: of_sums(run.engine.total(found)) for name, found in sums.items()}
    for name in (name for name, found in losses.items() if found is None):
        logger.warning("step %d: no label counts in the held-out sequences of source %s, so it has no loss", step, name)
    run.engine.end_evaluation()
    run.metrics.log_evaluation(step, {name: found for name, found in losses.items() if found is not None})
    run.control.took(evaluation=run.watch.clock() - began)
    run.metrics.resume_clock(run.loader.wait_seconds)


def _ask_tasks(run: Run, step: int) -> None:
    """Run the downstream tasks after a step, if there are any. A failure is recorded and does not end the run."""
    if run.tasks is None:
        return
    run.watch.enter("evaluate")
    scores, failure, seconds = run.tasks.ask()
    run.engine.end_evaluation()
    run.metrics.log_tasks(step, scores, failure, seconds)
    run.control.took(evaluation=seconds)
    run.metrics.resume_clock(run.loader.wait_seconds)


def _heldout(run: Run, name: str) -> Iterator[MicroBatch]:
    return heldout_batches(
        run.config.data,
        {name: run.sources[name]},
        sequences=run.config.evaluate.sequences,
        micro_batch=run.config.train.micro_batch_sequences,
        rank=run.engine.rank,
        world_size=run.engine.world_size,
    )


def _save(run: Run, step: int, reason: str) -> None:
    run.watch.enter("save")
    run.metrics.sync()
    run.state.save(step, reason)
    run.incidents.saved()
    run.metrics.resume_clock(run.loader.wait_seconds)
    if run.state.save_seconds:  # not known yet while the first save is written in the background
        run.control.took(save=run.state.save_seconds)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
