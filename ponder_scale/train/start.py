"""Build all parts of a run and resume it from its newest checkpoint."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ponder_scale.checkpoint.find import Ranks
from ponder_scale.checkpoint.index import saved_steps
from ponder_scale.config import RunConfig
from ponder_scale.data.loader import Loader, damaged_shard, open_sources
from ponder_scale.data.text_bytes import TextBytes, text_bytes
from ponder_scale.errors import ShardError, TokenizerError
from ponder_scale.files.write import write_whole
from ponder_scale.planning.auto import as_before, is_auto, settle
from ponder_scale.planning.plan import present_devices
from ponder_scale.planning.shape import run_shape
from ponder_scale.runs.attempts import Attempt
from ponder_scale.settings import load, to_yaml
from ponder_scale.setup.build import build_model, model_configuration
from ponder_scale.setup.recompute import apply_recompute
from ponder_scale.setup.speed import apply_speed
from ponder_scale.setup.warm_start import warm_start
from ponder_scale.setup.width import scale_initial_weights
from ponder_scale.shards.format import ShardSet
from ponder_scale.train.console import folded
from ponder_scale.train.contents import Contents
from ponder_scale.train.measure.metrics import Metrics
from ponder_scale.train.measure.profiling import Profiler
from ponder_scale.train.measure.tasks import Tasks
from ponder_scale.train.measure.work import Work
from ponder_scale.train.resume import Resumed, resume
from ponder_scale.train.state import RunState
from ponder_scale.train.survive.control import Control
from ponder_scale.train.survive.health import Health
from ponder_scale.train.survive.incidents import Incidents, left_out
from ponder_scale.train.survive.sanity import rehearse, trial_save
from ponder_scale.train.survive.watchdog import Watch, forget_ranks
from ponder_scale.train.zero.deepspeed_config import check_ranks, shardings
from ponder_scale.train.zero.engine import Engine, from_first_rank, init_distributed
from ponder_scale.train.zero.replica import replica

logger = logging.getLogger(__name__)

SUSPENSION = timedelta(days=7)  # a run may be suspended for this long and still continue
SLOWEST_SAVE = timedelta(hours=3)  # in a save, ranks wait this long for the slowest one


@dataclass(frozen=True)
class Run:
    """The parts of a run that the training loop uses."""

    config: RunConfig  # every `auto` is settled
    sources: dict[str, ShardSet]
    sizes: TextBytes | None  # bytes of each token, or None if not known
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
    tasks: Tasks | None
    first_step: int


def start(config: RunConfig, watch: Watch, attempt: Attempt) -> Run:
    """Make everything that the loop needs, at the step where the run continues. Collective."""
    run_dir = Path(config.run_dir)
    logger.info("run %s", run_dir)
    sources = open_sources(config.data, check=False)
    configuration = _configuration(config, sources)
    # The watchdog ends hangs. Collectives must not time out by themselves, because a run may be suspended for hours.
    init_distributed(None if config.health.hang_seconds is None else SUSPENSION)
    _check_shards(sources)
    config = _settled(config, configuration)
    tokenizer = next(iter(sources.values())).tokenizer_folder
    engine = Engine(_model(config, configuration, sources), config)
    tasks = Tasks(config.evaluate, partial(replica, engine), tokenizer, watch.alive) if config.evaluate.tasks else None
    loader = _loader(config, sources, engine)
    health, shape = Health(config.health), run_shape(config, configuration)
    work = Work(config, shape)
    model_values = json.loads(json.dumps(configuration.to_dict()))  # checkpoints compare values that JSON has changed
    contents = Contents(config, model_values, engine, loader, health, work)
    ranks = Ranks(engine.rank, engine.world_size, dist.new_group(backend="gloo", timeout=SLOWEST_SAVE), watch.alive)
    for stretch in engine.agreed(left_out(run_dir)):
        loader.leave_out(*stretch)
    began = time.monotonic()
    resumed = resume(run_dir, contents, ranks, attempt)
    loading = time.monotonic() - began
    if engine.rank == 0:
        _write_folder(run_dir, config, engine.world_size)
    metrics = _metrics(config, engine, work, attempt, start_step=resumed.step, vocabulary=shape.vocabulary)
    _tell(config, configuration, engine, resumed, metrics)
    control = Control(run_dir, config.train.time_limit, rank=engine.rank)
    state = RunState(contents, tokenizer, ranks, attempt, start_step=resumed.step, record=metrics.log_event)
    if resumed.step:
        control.took(load=loading)
    elif config.train.sanity_step:
        rehearse(engine, config, configuration.vocab_size)
        control.took(save=trial_save(run_dir, config, state))
    return Run(
        config=config,
        sources=sources,
        sizes=_sizes(sources),
        engine=engine,
        loader=loader,
        state=state,
        control=control,
        metrics=metrics,
        profiler=Profiler(config.log, run_dir, rank=engine.rank, first_step=resumed.step + 1),
        watch=watch,
        health=health,
        incidents=Incidents(run_dir, config.health, engine, loader, health, metrics),
        work=work,
        tasks=tasks,
        first_step=resumed.step + 1,
    )


def _metrics(
    config: RunConfig, engine: Engine, work: Work, attempt: Attempt, *, start_step: int, vocabulary: int
) -> Metrics:
    return Metrics(
        config,
        Path(config.run_dir),
        start_step=start_step,
        active=engine.rank == 0,
        work=work,
        vocabulary=vocabulary,
        peak=engine.peak_flops(),
        attempt=attempt.number,
        check_owned=attempt.check_owned,
    )


def _configuration(config: RunConfig, sources: dict[str, ShardSet]) -> Any:
    manifest = next(iter(sources.values())).manifest
    return model_configuration(
        config.model, vocab_size=manifest.vocab_size, seq_len=config.data.seq_len, eod_id=manifest.eod_id
    )


def _model(config: RunConfig, configuration: Any, sources: dict[str, ShardSet]) -> Any:
    """The model for the engine: initialized, with the run's fast kernels and recomputation."""
    model = build_model(configuration, config.seed)
    scale_initial_weights(model, config.optim.mup_base_width)
    # A run with checkpoints resumes from them, so it no longer needs the folder of `init_from`.
    if config.model.init_from is not None and not saved_steps(Path(config.run_dir)):
        tokenizer = next(iter(sources.values())).manifest.tokenizer
        warm_start(model, Path(config.model.init_from), tokenizer=tokenizer)
    apply_speed(model, config.train)
    apply_recompute(model, config.train.recompute, offload=config.train.offload_activations)
    return model


def _write_folder(run_dir: Path, config: RunConfig, world_size: int) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    forget_ranks(run_dir, world_size)
    write_whole(run_dir / "config.yaml", to_yaml(config))


def _tell(config: RunConfig, configuration: Any, engine: Engine, resumed: Resumed, metrics: Metrics) -> None:
    """Record and log how the run starts."""
    done, steps = resumed.step, config.train.steps
    if done:
        metrics.log_event("resume", done, world_size=engine.world_size)
    for change in resumed.changes:
        metrics.log_event("change", done, **change._asdict())
    logger.info(
        "%s parameters, S = %d, ZeRO-%d on %d ranks (%s), recompute %s, %s",
        *(f"{engine.parameters:,}", configuration.pondering_steps, engine.zero_stage, engine.world_size),
        *(engine.device, config.train.recompute, f"steps {done + 1} to {steps}" if done < steps else "no step left"),
    )
    if done >= steps:
        logger.info(
            "the run is finished: %d steps are trained, train.steps is %d; raise train.steps to continue", done, steps
        )


def _check_shards(sources: dict[str, ShardSet]) -> None:
    """Compare the shards with their manifests, each shard on one rank. Log the share of tokens that count in the loss.

    Collective. Raises ShardError on all ranks.
    """
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, damaged_shard(sources, dist.get_rank(), dist.get_world_size()))
    if problem := next(filter(None, found), None):
        raise ShardError(problem)
    for name, shards in sources.items():
        if shards.manifest.masked:
            counted = sum(info.tokens_that_count for info in shards.manifest.splits["train"])
            share = counted / max(1, shards.manifest.tokens("train"))
            logger.info("loss mask: in source %s, %s of the training tokens count", name, f"{share:.1%}")


def _sizes(sources: dict[str, ShardSet]) -> TextBytes | None:
    """The bytes of each token, for held-out bits per byte. None if they are not known, and evaluation goes without."""
    if not any(shards.manifest.splits.get("heldout") for shards in sources.values()):
        return None
    try:
        return text_bytes(sources.values())
    except TokenizerError as error:
        for line in folded(f"held-out losses will have no bits per byte: {error}"):
            logger.info("%s", line)
        return None


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


def _settled(config: RunConfig, configuration: Any) -> RunConfig:
    """The run with every `auto` settled: as the first attempt settled it, else by the planner. Collective."""
    if not is_auto(config.train):
        return config
    if dist.get_rank() == 0:
        written = Path(config.run_dir, "config.yaml")
        before = load(RunConfig, written).train if written.is_file() else None
        config = as_before(config, before, dist.get_world_size())
        files, devices = shardings(config.train, config.optim), present_devices(config, dist.get_world_size())
        for sharding in files.values():
            check_ranks(sharding, config.train, devices.ranks)
        config, said = settle(config, files, configuration, devices)
        train = config.train
        logger.info("auto: recompute %s, micro-batch %s, %s", train.recompute, train.micro_batch, train.deepspeed)
        for line in (part for sentence in said for part in folded(sentence)):
            logger.info("%s", line)
    return from_first_rank(config)
