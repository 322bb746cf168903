"""A build, from inputs to a sealed folder of shards: plan, read, clean, tokenize, write, seal.

    begin     the plan: units of work, which depend on the inputs alone
    stages    the table of what is done, each stage many tasks: duplicates found, units made shards, caps, a shuffle
    shard     the task that reads, cleans, tokenizes and writes one unit
    workers   the tasks of a stage, by all processes of all ranks
    finish    the manifest, and the name of the folder

    OUT.partial/work/plan.jsonl        written first
    OUT.partial/work/STAGE/*.json      the journal of each task that is done
    OUT.partial/train-00012.bin, .idx  the shards of unit 12, given their names whole and never copied again
    OUT.partial/manifest.json          written last; then the folder becomes OUT

Killed anywhere, the same command goes on, with any number of workers or ranks, and makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from data_pipeline.build.begin import FAILED, Added, prepare
from data_pipeline.build.finish import finish
from data_pipeline.build.parallel import assemble, part
from data_pipeline.build.stages import STAGES
from data_pipeline.build.workers import run_stage
from data_pipeline.config import BuildConfig
from data_pipeline.write.output import WORK, check_places, unfinished, workspace
from ponder_scale.errors import UserError
from ponder_scale.files.places import check_folder
from ponder_scale.shards.manifest import Manifest, read_manifest


class Built(NamedTuple):
    """What a build made, or found made."""

    manifest: Manifest
    new: bool


def build(config: BuildConfig, command: str) -> Built | None:
    """Make the folder `config.out`; what it holds. Under MPI every rank calls it and rank 0 gets the answer.

    Raises a UserError when an input, the tokenizer or `out` cannot be used; what is done by then is kept, and
    used when the same build is started again.
    """
    done = run(config, command)
    return None if done is None else Built(read_manifest(Path(config.out).resolve()), done)


def run(
    config: BuildConfig, command: str, first: Callable[[], bool] = lambda: True, seen: Added | None = None
) -> bool | None:
    """Do the work of `build`; whether there was any, on rank 0, and None on all others.

    Args:
        first: what rank 0 does before all else; there is nothing to do if it returns False.
        seen: documents that `deduplicate` takes for earlier ones.
    """
    out = Path(config.out).resolve()
    folder = unfinished(out)
    with ExitStack() as held:

        def begin() -> bool:
            if not first():
                return False
            check_folder(Path(config.out), "out")
            check_places(out, config.sources, Path(config.tokenizer), config.overwrite)
            return prepare(held.enter_context(workspace(out)), out, config, command, seen)

        team, to_do = assemble(config.workers, begin)
        if to_do:
            try:
                for stage in STAGES:
                    if stage.is_needed(config):
                        run_stage(folder, config, stage, team)
                part(team, folder / WORK, config.lease_seconds)
                if team.rank == 0:
                    finish(folder, out, config)
            except UserError as error:  # the inputs may be mended: begin goes on from what is done
                if (folder / WORK).is_dir():
                    (folder / WORK / FAILED).write_text(f"{error}\n", encoding="utf-8")
                raise
    return to_do if team.rank == 0 else None
