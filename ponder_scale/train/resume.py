"""Resume a run from its newest whole checkpoint, on any number of ranks."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from ponder_scale.checkpoint.find import Ranks, average_since, newest_whole, read_state, set_aside
from ponder_scale.checkpoint.index import part_files
from ponder_scale.checkpoint.parts import Parts, Table, part_name, read_table, shares
from ponder_scale.errors import CheckpointError
from ponder_scale.runs.attempts import Attempt
from ponder_scale.train.changes import Change, between
from ponder_scale.train.contents import Contents
from ponder_scale.train.zero.engine import Engine

logger = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """The point from which a run continues."""

    step: int  # the last step that is done; 0 for a new run
    changes: list[Change]  # between the checkpoint and this attempt


def resume(run_dir: Path, contents: Contents, ranks: Ranks, attempt: Attempt) -> Resumed:
    """Load the newest whole checkpoint and take the run over. Collective.

    Ranks, ZeRO stage and micro-batch may differ from those that it was saved with.

    Raises:
        CheckpointError: none of the checkpoints is whole, or the newest is of another model, optimizer or precision.
    """
    newest = newest_whole(run_dir, ranks)
    resumed = Resumed(0, []) if newest is None else _load(newest, contents, ranks)
    hosts = sorted(set(ranks.gather(socket.gethostname())))
    if ranks.rank == 0:
        attempt.claim(
            hosts=hosts,
            world_size=ranks.world_size,
            first_step=resumed.step + 1,
            changed={change.key: [change.before, change.after] for change in resumed.changes},
            resumed_from=newest and newest.name,
        )
    attempt.join(ranks.gather(attempt.number)[0])
    if ranks.rank == 0:
        for folder in set_aside(run_dir, resumed.step):
            logger.warning(
                "put aside %s, because the run continues from an earlier step; look at it, then delete it", folder
            )
    return resumed


def _load(newest: Path, contents: Contents, ranks: Ranks) -> Resumed:
    state = read_state(newest)
    _check(newest, state, contents)
    engine, loader, work = contents.engine, contents.loader, contents.work
    layout = (state["world_size"], state["zero_stage"])
    same = layout == (engine.world_size, engine.zero_stage)
    parts = _parts(engine, newest, ranks, same=same)
    engine.restore(parts, state["optimizer"]["scalars"], average_since(state), ranks.alive)
    loader.restore(state["loader"])
    contents.health.restore(state["health"])
    if "done" in state:
        work.restore(state["done"])
    else:
        work.estimate(state, loader.taken)
        logger.info(
            "%s does not record the work of the run; its loader gives %s tokens, and its recipe gives the FLOPs",
            *(newest, f"{work.tokens:,}"),
        )
    logger.info("continuing from %s", newest)
    logger.info("attempt %d saved it", state["attempt"])
    if not same:
        logger.info(
            "it was saved by %d ranks under ZeRO-%d; now %d ranks under ZeRO-%d each read the parts that they need",
            *(*layout, engine.world_size, engine.zero_stage),
        )
    changes = between(state, contents.circumstances())
    for change in changes:
        logger.info("%s", change.sentence(state["step"] + 1))
    return Resumed(state["step"], changes)


def _parts(engine: Engine, newest: Path, ranks: Ranks, *, same: bool) -> Parts:
    """The parts that this rank reads: its own file if that is enough on every rank, else what it needs of all files."""
    if same:
        own = Parts(newest, [part_name(ranks.rank)])
        if all(ranks.gather(engine.partition.is_in(own))):
            return own
    return Parts(newest, table=_needed(engine, newest, ranks))


def _needed(engine: Engine, newest: Path, ranks: Ranks) -> Table:
    """Find the files that hold the elements of this rank. Collective: each header is read by one rank.

    The whole table grows with the parameters times the ranks that saved them. So only rank 0 holds it, and sends each
    rank the rows that it needs.
    """
    found, error = {}, None
    try:
        found = read_table(newest, part_files(newest)[ranks.rank :: ranks.world_size])
    except CheckpointError as problem:
        error = str(problem)
    answers: list[Any] | None = [None] * ranks.world_size if ranks.rank == 0 else None
    dist.gather_object((found, error, engine.partition.needs()), answers, dst=0, group=ranks.group)
    given: list[Any] | None = None
    if answers is not None:
        given = shares(newest, answers)
    box: list[Any] = [None]
    dist.scatter_object_list(box, given, src=0, group=ranks.group)
    table, error = box[0]
    if error is not None:
        raise CheckpointError(error)
    return table


def _check(newest: Path, state: dict[str, Any], contents: Contents) -> None:
    for key, saved in state["model"].items():
        value = contents.model_values.get(key, saved)
        if saved != value and key not in ("transformers_version", "dtype", "torch_dtype"):
            raise CheckpointError(
                f"checkpoint {newest}: its model has {key} {saved}, but this run has {value}; "
                "use another run_dir, or the same model"
            )
    for key, saved, value in (
        ("optimizer", state["optimizer"]["name"], contents.engine.optimizer_name),
        ("train.precision", state["config"]["train"]["precision"], contents.config.train.precision),
    ):
        if saved != value:
            raise CheckpointError(
                f"checkpoint {newest}: was saved with {key} {saved}, but this run has {value}; use {saved}"
            )
