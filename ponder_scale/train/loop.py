"""The training loop."""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ponder_scale.checkpoint.save import saved_steps
from ponder_scale.config import RunConfig
from ponder_scale.data.heldout import loss_sums, of_sums
from ponder_scale.data.loader import Loader, damaged_shard, heldout_batches, open_sources
from ponder_scale.data.sequences import IGNORE_INDEX, MicroBatch
from ponder_scale.errors import ConfigError, ShardError
from ponder_scale.files.places import write_whole
from ponder_scale.planning.auto import as_before, is_auto, settle
from ponder_scale.planning.plan import present_devices
from ponder_scale.planning.shape import model_shape
from ponder_scale.settings import load, to_yaml
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.setup.recompute import apply_recompute
from ponder_scale.setup.speed import apply_speed
from ponder_scale.setup.warm_start import warm_start
from ponder_scale.shards.format import ShardSet
from ponder_scale.train import generators
from ponder_scale.train.measure.metrics import Metrics, StepTally
from ponder_scale.train.measure.profiling import Profiler
from ponder_scale.train.measure.work import Work
from ponder_scale.train.schedules import learning_rate, pondering_steps
from ponder_scale.train.state import RunState
from ponder_scale.train.survive.control import Control, Orders
from ponder_scale.train.survive.health import Health
from ponder_scale.train.survive.incidents import REWIND, Incidents, left_out
from ponder_scale.train.survive.sanity import rehearse, trial_save
from ponder_scale.train.survive.watchdog import Watch, forget_ranks
from ponder_scale.train.zero.deepspeed_config import check_ranks, read_sharding
from ponder_scale.train.zero.engine import Engine, from_first_rank, init_distributed

logger = logging.getLogger(__name__)

SUSPENSION = timedelta(days=7)  # that a run may be stopped for and go on


def train(config: RunConfig) -> int:
    """Train the run to its last step, from its newest whole checkpoint if it has one. Every rank calls it.

    Returns the exit code: 0, or that of the orders (a signal, a request file, the time limit) that ended it before.
    """
    with Watch(Path(config.run_dir), config.health, rank=int(os.environ.get("RANK", "0"))) as watch:
        run = _start(config, watch)
        try:
            return _train(run)
        except Exception:
            run.watch.enter("save")
            run.state.abandon()  # whatever ends the run, a save that is being written behind is not lost by it
            raise


def _train(run: _Run) -> int:
    """The loop: forward and backward, agreement, update, log, save, evaluate."""
    config = run.config
    gc.freeze()  # no rank pauses, and lets the others wait, to look for garbage in what the run is made of
    gc.enable()
    if refusal := run.engine.agreed(run.control.refusal()):
        raise ConfigError(refusal)
    _, orders = _agree(run)  # a signal may have come while the engine was built
    step = run.first_step - 1
    due = step > 0 and (step == config.train.steps or _due(step, config.evaluate.every_steps))
    if due and not orders.stop and not run.engine.agreed(run.metrics.has_evaluation(step)):
        _evaluate(run, step)  # the attempt before had to end
    run.metrics.resume_clock(run.loader.wait_seconds)
    while step < config.train.steps and not orders.stop:
        step, began = step + 1, run.watch.clock()
        run.watch.enter("data", step)
        run.incidents.begin_step()
        lr = learning_rate(step, config.train.steps, config.optim)
        run.engine.set_learning_rate(lr)
        ponder = pondering_steps(step, config.model.pondering_steps, config.train.pondering, config.seed)
        if config.train.pondering.schedule != "fixed":
            run.engine.agree_on(ponder)
        last = step == config.train.steps
        logged = step == run.first_step or last or step % config.log.every_steps == 0
        with run.profiler.step(step, logged=logged) as communication:
            tally = _accumulate(run, step, ponder, logged=logged)
            run.watch.enter("step")
            sums, orders = _agree(run, tally)
            means, labels = tally.means(sums), int(sums[-1])
            if _due(step, config.health.check_replicas_every):
                run.incidents.compare_replicas(step)
            grad_norm = run.engine.step(partial(run.health.accepts, means["pass_losses"][-1], labels=labels))
            run.engine.average_weights(step)
        run.work.add(config.train.batch_at(step), ponder, updated=run.engine.updated)
        run.control.took(step=run.watch.clock() - began)
        if logged:
            run.metrics.log_step(
                step,
                means,
                labels=labels,
                grad_norm=grad_norm,
                lr=lr,
                data_wait=run.loader.wait_seconds,
                communication=communication.share,
            )
            run.incidents.name_straggler(step, run.watch, first=step == run.first_step)
        if run.health.finding is not None and run.incidents.treat(step, tally) == REWIND:
            step, orders = step - 1, replace(orders, save=False) if orders.stop else REWIND
            break
        if reason := run.state.due(step) or (orders.save and orders.reason):
            _save(run, step, reason)
        if last or (_due(step, config.evaluate.every_steps) and not orders.stop):
            _evaluate(run, step)
        run.state.poll()
        run.control.done(orders)
    return _end(run, step, orders)


@dataclass(frozen=True)
class _Run:
    config: RunConfig
    sources: dict[str, ShardSet]
    engine: Engine
    loader: Loader
    state: RunState
    control: Control
    metrics: Metrics
    profiler: Profiler
    watch: Watch
    health: Health
    incidents: Incidents
    work: Work
    first_step: int


def _start(config: RunConfig, watch: Watch) -> _Run:
    """Everything the loop needs, at the step where the run goes on."""
    run_dir = Path(config.run_dir)
    logger.info("run %s", run_dir)
    sources = open_sources(config.data, check=False)
    manifest = next(iter(sources.values())).manifest
    configuration = model_configuration(
        config.model, vocab_size=manifest.vocab_size, seq_len=config.data.seq_len, eod_id=manifest.eod_id
    )
    # a hang is the watchdog's to end; a run that was stopped for hours must find its collectives as they were
    init_distributed(None if config.health.hang_seconds is None else SUSPENSION)
    _check_shards(sources)
    for name, shards in sources.items():
        if shards.manifest.masked:
            logger.info("loss mask: of source %s %s of the training tokens count", name, _share_that_counts(shards))
    config = _settled(config, configuration)
    model = build_model(configuration, config.seed)
    # a run that has a checkpoint goes on from that, also where the folder that it began with is gone
    if config.model.init_from is not None and not saved_steps(run_dir):
        warm_start(model, Path(config.model.init_from), tokenizer=manifest.tokenizer)
    apply_speed(model, config.train)
    apply_recompute(model, config.train.recompute, offload=config.train.offload_activations)
    engine = Engine(model, config)
    loader = _loader(config, sources, engine)
    model_values = json.loads(json.dumps(configuration.to_dict()))  # as a checkpoint gives it back
    tokenizer = next(iter(sources.values())).tokenizer_folder
    health = Health(config.health)
    shape = model_shape(configuration, config.data.seq_len)
    work = Work(config, shape)
    state = RunState(config, model_values, tokenizer, engine, loader, health, work, watch.alive)
    for stretch in engine.agreed(left_out(run_dir)):
        loader.leave_out(*stretch)
    began = time.monotonic()
    done = state.resume()
    loading = time.monotonic() - began
    watch.check_owned = state.check_owned
    if engine.rank == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        forget_ranks(run_dir, engine.world_size)
        write_whole(run_dir / "config.yaml", to_yaml(config))
    metrics = Metrics(
        config,
        run_dir,
        start_step=done,
        active=engine.rank == 0,
        work=work,
        vocabulary=shape.vocabulary,
        peak=engine.peak_flops(),
        attempt=state.attempt,
        check_owned=state.check_owned,
    )
    state.record = metrics.log_event
    if done:
        metrics.log_event("resume", done, world_size=engine.world_size)
    for change in state.changes:
        metrics.log_event("change", done, **change._asdict())
    steps = config.train.steps
    logger.info(
        "%s parameters, S = %d, ZeRO-%d on %d ranks (%s), recompute %s, %s",
        *(f"{engine.parameters:,}", configuration.pondering_steps, engine.zero_stage, engine.world_size),
        *(engine.device, config.train.recompute, f"steps {done + 1} to {steps}" if done < steps else "no step left"),
    )
    if done >= steps:
        logger.info("the run is finished: %d steps are trained, train.steps is %d; raise it to go on", done, steps)
    control = Control(run_dir, config.train.time_limit, rank=engine.rank)
    if done:
        control.took(load=loading)
    profiler = Profiler(config.log, run_dir, rank=engine.rank, first_step=done + 1)
    incidents = Incidents(run_dir, config.health, engine, loader, health, metrics)
    if config.train.sanity_step and not done:
        rehearse(engine, config, configuration.vocab_size)
        control.took(save=trial_save(run_dir, config, state))
    watched = (control, metrics, profiler, watch, health, incidents, work)
    return _Run(config, sources, engine, loader, state, *watched, done + 1)


def _check_shards(sources: dict[str, ShardSet]) -> None:
    """Compare the shards with their manifests, each on one rank. Collective; raises ShardError on all of them."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, damaged_shard(sources, dist.get_rank(), dist.get_world_size()))
    if problem := next(filter(None, found), None):
        raise ShardError(problem)


def _share_that_counts(shards: ShardSet) -> str:
    infos = shards.manifest.splits["train"]
    return f"{sum(info.tokens_that_count for info in infos) / max(1, sum(info.tokens for info in infos)):.1%}"


def _loader(config: RunConfig, sources: dict[str, ShardSet], engine: Engine) -> Loader:
    return Loader(
        config.data,
        sources,
        seed=config.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch_sequences,
        rank=engine.rank,
        world_size=engine.world_size,
    )


def _accumulate(run: _Run, step: int, ponder: int, *, logged: bool) -> StepTally:
    """Forward and backward of the micro-batches of a step; what they report."""
    tally = StepTally()
    generators.seed(run.config.seed, step, run.engine.rank)
    extras: dict[str, Any] = {"track": run.config.log.track_tokens if logged else None}
    sequences, ahead = (run.config.train.batch_at(number) for number in (step, step + 1))
    run.engine.set_batch(sequences)
    batches = run.loader.next_batches(sequences, ahead)
    counts = [int((batch.labels != IGNORE_INDEX).sum()) for batch in batches]
    if run.config.data.packing == "best-fit" or any(shards.manifest.masked for shards in run.sources.values()):
        # fewer labels count in some batches than in others; each weighs the same in the step, and none is no division
        mean = run.engine.mean(counts)
        extras["label_count"] = torch.where(mean > 0, mean, 1.0)
    for batch, count in zip(batches, counts, strict=True):  # tokens are (micro_batch, seq_len + 1)
        run.watch.enter("forward")
        output = run.engine.forward(batch.tokens[:, :-1], batch.labels, ponder, batch.position_ids, **extras)
        tally.add(output, count)
        run.watch.enter("backward")
        run.engine.backward(output.loss)
    return tally


def _agree(run: _Run, tally: StepTally | None = None) -> tuple[torch.Tensor, Orders]:
    """The step's sums over all ranks, and what all do after it, by one all-reduce of a few numbers."""
    sums = torch.zeros(0, device=run.engine.device) if tally is None else tally.sums()
    wishes = torch.tensor(run.control.wishes(save=run.state.late()), device=sums.device)
    total = run.engine.total(torch.cat([sums, wishes]))
    return total[: sums.numel()], run.control.orders(total[sums.numel() :].tolist())


def _end(run: _Run, step: int, orders: Orders) -> int:
    """Close everything, once all ranks are here: a launcher may end the others as soon as the first leaves."""
    complete = step >= run.config.train.steps
    reason, code = ("done", 0) if complete else (orders.reason, orders.exit_code or 0)
    if not complete:
        logger.info("ended at step %d by %s%s", step, reason, "" if orders.save else ", without saving")
    run.control.done(orders)
    run.watch.enter("save")  # one written behind may still be under way
    run.state.close()
    run.metrics.log_event("end", step, reason=reason, exit_code=code)
    run.profiler.close()
    run.loader.close()
    run.metrics.close()
    dist.barrier()
    return code


def _settled(config: RunConfig, configuration: Any) -> RunConfig:
    """The run with what is left to the planner decided: as it was when the run began, else by what fits. Collective."""
    if not is_auto(config.train):
        return config
    if dist.get_rank() == 0:
        written = Path(config.run_dir, "config.yaml")
        before = load(RunConfig, written).train if written.is_file() else None
        config = as_before(config, before, dist.get_world_size())
        sharding, devices = read_sharding(config.train.deepspeed), present_devices(config, dist.get_world_size())
        check_ranks(sharding, config.train, devices.ranks)
        config = settle(config, sharding, configuration, devices)
        train = config.train
        logger.info("auto: recompute %s, micro-batch %s", train.recompute, train.micro_batch)
    return from_first_rank(config)


def _evaluate(run: _Run, step: int) -> None:
    """The held-out losses after a step. Where that fails, the step is saved before the run ends. Collective."""
    run.watch.enter("evaluate")
    began = run.watch.clock()
    sums: dict[str, torch.Tensor] = {}
    failure: Exception | None = None
    try:
        for name in run.sources:
            found = loss_sums(run.engine.predict, _heldout(run, name), run.watch.alive)
            if found is not None:
                sums[name] = found
    except Exception as error:
        logger.exception("step %d: the evaluation failed on rank %d; saving the step", step, run.engine.rank)
        failure = error
    if failure is not None and run.engine.zero_stage == 3:
        run.watch.enter("step")  # if it failed here alone, the others wait in a gather: not for as long as they may
    if run.engine.total(torch.tensor(float(failure is not None))):
        _save(run, step, "a failed evaluation")
        raise failure or RuntimeError(f"step {step}: the evaluation failed on another rank; see its log")
    losses = {name: of_sums(run.engine.total(found)) for name, found in sums.items()}
    for name in (name for name, found in losses.items() if found is None):
        logger.warning("step %d: no label counts in the held-out sequences of source %s: it has no loss", step, name)
    run.engine.end_evaluation()
    run.metrics.log_evaluation(step, {name: found for name, found in losses.items() if found is not None})
    run.control.took(evaluation=run.watch.clock() - began)
    run.metrics.resume_clock(run.loader.wait_seconds)


def _heldout(run: _Run, name: str) -> Iterator[MicroBatch]:
    return heldout_batches(
        run.config.data,
        {name: run.sources[name]},
        sequences=run.config.evaluate.sequences,
        micro_batch=run.config.train.micro_batch_sequences,
        rank=run.engine.rank,
        world_size=run.engine.world_size,
    )


def _save(run: _Run, step: int, reason: str) -> None:
    run.watch.enter("save")
    run.metrics.sync()
    run.state.save(step, reason)
    run.incidents.saved()
    run.metrics.resume_clock(run.loader.wait_seconds)
    if run.state.save_seconds:  # none known while the first one is written behind
        run.control.took(save=run.state.save_seconds)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
