"""Build a sealed folder of shards from inputs: plan, read, clean, tokenize, write, seal.

    begin     makes the plan: units of work, which depend on the inputs alone
    stages    lists the stages of many tasks each: find duplicates, turn units into shards, apply caps, shuffle
    shard     does the task that reads, cleans, tokenizes and writes one unit
    workers   runs the tasks of a stage on all processes of all ranks
    finish    writes the manifest and gives the folder its final name

    OUT.partial/work/plan.jsonl        written first
    OUT.partial/work/STAGE/*.json      the journal of each finished task
    OUT.partial/train-00012.bin, .idx  the shards of unit 12, renamed when they are whole and never copied again
    OUT.partial/manifest.json          written last. Then the folder is renamed to OUT.

If a build is killed at any point, run the same command again. It continues with any number of workers or ranks, and
produces the same bytes.
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
    """The result of a build, made now or before."""

    manifest: Manifest
    new: bool


def build(config: BuildConfig, command: str) -> Built | None:
    """Build the folder `config.out` and return what it holds. Under MPI all ranks call it, and rank 0 gets the result.

    Raises a UserError if an input, the tokenizer or `out` cannot be used. Work done by then is kept, and the same build
    uses it when you start it again.
    """
    done = run(config, command)
    return None if done is None else Built(read_manifest(Path(config.out).resolve()), done)


def run(
    config: BuildConfig, command: str, first: Callable[[], bool] = lambda: True, seen: Added | None = None
) -> bool | None:
    """Do the work of `build`. Returns whether there was any work on rank 0, and None on all other ranks.

    Args:
        first: called by rank 0 before anything else. If it returns False there is nothing to do.
        seen: documents that `deduplicate` treats as earlier ones.
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
            except UserError as error:  # you may repair the inputs; the next `begin` continues from the finished tasks
                if (folder / WORK).is_dir():
                    (folder / WORK / FAILED).write_text(f"{error}\n", encoding="utf-8")
                raise
    return to_do if team.rank == 0 else None
