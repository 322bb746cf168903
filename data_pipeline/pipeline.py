"""A build, from inputs to a sealed folder of shards: plan, read, clean, tokenize, write, seal.

    OUT.partial/work/plan.jsonl        units of work, written first; they depend on the inputs alone
    OUT.partial/work/STAGE/*.json      the journal of each task that is done
    OUT.partial/train-00012.bin, .idx  the shards of unit 12, given their names whole and never copied again
    OUT.partial/manifest.json          written last; then the folder becomes OUT

Killed anywhere, the same command goes on, with any number of workers or ranks, and makes the same bytes.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data_pipeline.autotokenizer import check_agreement
from data_pipeline.backends import choose
from data_pipeline.config import BuildConfig
from data_pipeline.document import Unit
from data_pipeline.filters import chosen
from data_pipeline.manifest import DROPPED, INPUTS, QUARANTINE, compose, origin, totals, write_inputs
from data_pipeline.output import WORK, check_replaceable, empty, publish, unfinished, workspace
from data_pipeline.parallel import Stage, assemble, part
from data_pipeline.readers import read
from data_pipeline.tasks import SPLITS
from data_pipeline.tokenizer import Tokenizer, open_tokenizer, save
from data_pipeline.units import PLAN, Plan, units, write_plan
from data_pipeline.workers import run_stage
from ponder_scale.errors import ConfigError
from ponder_scale.manifest import MANIFEST, Manifest, ShardInfo, read_manifest, seal, sync, sync_folder
from ponder_scale.places import check_folder
from ponder_scale.shards import TOKENIZER, open_shards

PARITY_DOCUMENTS, PARITY_CHARACTERS = 32, 2**16  # of the corpus at most, on which engines are compared at first
_NEW_PLAN = "plan.new.jsonl"


class Built(NamedTuple):
    """What a build made, or found made."""

    manifest: Manifest
    new: bool


def build(config: BuildConfig, command: str) -> Built | None:
    """Make the folder `config.out`; what it holds. Under MPI every rank calls it and rank 0 gets the answer.

    Raises a UserError when an input, the tokenizer or `out` cannot be used; what is done by then is kept, and
    used when the same build is started again.
    """
    out = Path(config.out).resolve()
    folder = unfinished(out)
    with ExitStack() as held:

        def prepare() -> bool:
            check_folder(Path(config.out), "out")
            check_replaceable(out)
            return _prepare(held.enter_context(workspace(out)), out, config, command)

        team, to_do = assemble(config.workers, prepare)
        if to_do:
            for stage in _stages(config):
                run_stage(folder, config, stage, team, "build" if stage in ("shards", "scatter") else stage)
            part(team, folder / WORK, config.lease_seconds)
            if team.rank == 0:
                _finish(folder, out, config)
    return Built(read_manifest(out), to_do) if team.rank == 0 else None


def _stages(config: BuildConfig) -> Iterator[str]:
    if config.deduplicate != "none":
        yield from ("keys", "duplicates")
    yield from ("scatter", "gather") if config.shuffle else ("shards",)


def _prepare(folder: Path, out: Path, config: BuildConfig, command: str) -> bool:
    """Leave a plan and the tokenizer in `folder`; False where `out` is already what is asked for."""
    work = folder / WORK
    new = not work.exists()
    try:
        tokenizer = _open_tokenizer(Path(config.tokenizer), config)
        for name, source in config.sources.items():
            chosen(name, source.filters)
        work.mkdir(exist_ok=True)
        plan = write_plan(work / _NEW_PLAN, units(config.sources, config.shard_bytes), {})
        made_from = origin(config, tokenizer, plan)
        if _is_built(out, made_from, config.overwrite):
            (work / _NEW_PLAN).unlink()
            if new:
                work.rmdir()
            return False
        if _was_sealed(folder, made_from):
            publish(folder, out)
            return False
        if _goes_on(folder, made_from, config.overwrite):
            (work / _NEW_PLAN).unlink()
            for leftover in ("claims", "scratch", "ranks"):  # of workers that are gone
                shutil.rmtree(work / leftover, ignore_errors=True)
        else:
            _begin(folder, tokenizer, config, {"origin": made_from, "command": command})
        return True
    except BaseException:
        if new:
            empty(folder)
        raise


def _begin(folder: Path, tokenizer: Tokenizer, config: BuildConfig, header: dict[str, Any]) -> None:
    """Empty the folder but for the new plan, and give that its name when all else is there."""

    def warn(message: str) -> None:
        print(f"warning: {message}", file=sys.stderr, flush=True)

    check_agreement(tokenizer, config.eod_token is None, warn)
    plan = (folder / WORK / _NEW_PLAN).rename(folder.with_name(folder.name + ".plan"))
    empty(folder)
    (folder / WORK / "quarantine").mkdir(parents=True)
    plan = plan.rename(folder / WORK / _NEW_PLAN)
    save(tokenizer, folder / TOKENIZER)
    planned = Plan(plan)
    samples = _first_documents(planned.unit(0), config) if len(planned) else []
    engine = choose(config.backend, tokenizer, samples, warn)
    every = (planned.unit(number) for number in range(len(planned)))
    write_plan(folder / WORK / PLAN, every, {**header, "engine": engine})
    plan.unlink()


def _first_documents(unit: Unit, config: BuildConfig) -> list[str]:
    records = read(unit.pieces[0], config.sources[unit.source], config.max_document_bytes, xxhash.xxh3_128())
    texts, left = [], PARITY_CHARACTERS  # the reference is slow, and samples of each unit follow
    for record in islice(records, PARITY_DOCUMENTS):
        text = record.text or ""
        if len(text) <= left:
            texts.append(text)
            left -= len(text)
    return texts


def _was_sealed(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether only the last step is missing: the folder is finished but has not got its name."""
    return (folder / MANIFEST).is_file() and read_manifest(folder).provenance.get("origin") == made_from


def _goes_on(folder: Path, made_from: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds the beginning of this build. Raises ConfigError when it holds that of another one,
    with units done."""
    work = folder / WORK
    if (work / PLAN).is_file():
        other = Plan(work / PLAN).header["origin"]
        if other == made_from:
            return True
        if any(any((work / stage).glob("*.json")) for stage in ("keys", "shards", "scatter")) and not overwrite:
            raise ConfigError(
                f"{folder} holds an unfinished build from other {_difference(other, made_from)}; restore them to "
                f"finish it, or give overwrite=true to begin anew"
            )
    return False


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    known = {**one["config"], **other["config"]}
    keys = [key for key in known if one["config"].get(key) != other["config"].get(key)]
    if one.get("cleaning") != other.get("cleaning"):
        keys.append("the rules of filters and near duplicates of another version of this program")
    if one["tokenizer"] != other["tokenizer"]:
        keys.append("tokenizer files")
    if one["ends"] != other["ends"]:
        keys.append("tokens that begin and end documents")
    if one.get("filters") != other.get("filters"):
        keys.append("files that filters read")
    return f"settings ({', '.join(keys)})" if keys else "inputs"


def _is_built(out: Path, made_from: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` is the result already. Raises ConfigError when it is something else that must not go."""
    if overwrite or not (out / MANIFEST).is_file():
        return False
    made = open_shards(out).manifest.provenance.get("origin")
    if made != made_from:
        differs = f": {_difference(made, made_from)} differ" if made else ""
        raise ConfigError(
            f"out is {out}, which was made from other inputs, settings or another tokenizer{differs}; give "
            f"overwrite=true to replace it, or choose another out"
        )
    return True


def _finish(folder: Path, out: Path, config: BuildConfig) -> None:
    """Seal the manifest from the journals of all tasks and give the folder its name."""
    plan = Plan(folder / WORK / PLAN)

    def results(name: str) -> Iterator[dict[str, Any]]:
        stage = Stage(folder / WORK, name, plan.sizes, config.lease_seconds)
        return map(stage.result, range(len(list(stage.folder.glob("*.json")))))

    read_by, made_by = ("scatter", "gather") if config.shuffle else ("shards", "shards")
    counts = totals(results(read_by), config)
    write_inputs(results(read_by), folder / INPUTS)
    joined = {QUARANTINE: "*[0-9].jsonl", **({DROPPED: "*.dropped.jsonl"} if config.keep_dropped else {})}
    for name, parts in joined.items():
        _join(sorted((folder / WORK / "quarantine").glob(parts)), folder / name)
    splits: dict[str, list[ShardInfo]] = {split: [] for split in SPLITS}
    for result in results(made_by):
        for split in SPLITS:
            splits[split] += [ShardInfo(**info) for info in result["shards"][split]]
    engines = [result["engine"] for result in results(read_by)]
    provenance = {
        **{key: plan.header[key] for key in ("command", "origin")},
        "sources": counts,
        "engines": {name: engines.count(name) for name in sorted(set(engines))},  # units done by each
    }
    files = [folder / INPUTS, *(folder / name for name in joined), *sorted((folder / TOKENIZER).iterdir())]
    tokenizer = _open_tokenizer(folder / TOKENIZER, config)
    seal(folder, compose(folder, config, tokenizer, splits, files, provenance))
    open_shards(folder)
    publish(folder, out)


def _join(parts: list[Path], whole: Path) -> None:
    with whole.open("wb") as stream:
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, stream)
        sync(stream)
    sync_folder(whole.parent)


def _open_tokenizer(path: Path, config: BuildConfig) -> Tokenizer:
    return open_tokenizer(path, config.eod_token, config.bos_token, config.special_tokens_in_text == "tokens")
