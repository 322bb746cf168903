"""Begin a build: report every error that can be found before work starts, and find work that is already done."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data_pipeline.build.shard import SPLITS
from data_pipeline.build.stages import STAGES, is_capped
from data_pipeline.clean.filters import chosen, edits
from data_pipeline.config import BuildConfig, SourceConfig
from data_pipeline.document import Unit
from data_pipeline.read.chat import open_template
from data_pipeline.read.readers import read
from data_pipeline.read.sources import LeftOut
from data_pipeline.read.units import PLAN, Plan, units, write_plan
from data_pipeline.tokenize.autotokenizer import check_agreement
from data_pipeline.tokenize.backends import choose
from data_pipeline.tokenize.masked import check_cuts
from data_pipeline.tokenize.tokenizer import Tokenizer, save, tokenizer_of
from data_pipeline.write.manifest import origin
from data_pipeline.write.output import WORK, named_by_build, places, publish
from ponder_scale.errors import ConfigError
from ponder_scale.files.delete import MARK, delete_contents, delete_file, delete_if_empty, delete_made
from ponder_scale.shards.format import TOKENIZER, open_shards
from ponder_scale.shards.manifest import MANIFEST, read_manifest, unsealed

PARITY_DOCUMENTS, PARITY_CHARACTERS = 32, 2**16  # how much of the corpus is used for the first comparison of engines
FAILED = "failed"  # holds the reason why a build could not be finished
_NEW_PLAN = "plan.new.jsonl"


class Added(NamedTuple):
    """What a build knows about the set that it adds documents to."""

    keys: Path  # file with the keys of its documents
    hash: str  # hash of that file


def prepare(folder: Path, out: Path, config: BuildConfig, command: str, seen: Added | None) -> bool:
    """Write a plan and the tokenizer to `folder`. Returns False if `out` is already the requested result."""
    work = folder / WORK
    new = {path.name for path in folder.iterdir()} == {MARK}
    left_out = LeftOut()
    try:
        tokenizer = tokenizer_of(Path(config.tokenizer), config)
        for name, source in config.sources.items():
            chosen(name, source.filters)
            _check_loss(name, source)
        if any(source.loss is not None for source in config.sources.values()):
            check_cuts(tokenizer)
        work.mkdir(exist_ok=True)
        planned = units(config.sources, config.shard_bytes, left_out, places(out))
        made_from = origin(config, tokenizer, write_plan(work / _NEW_PLAN, planned, {}))
        if seen is not None:
            made_from["seen"] = seen.hash
        for line in left_out:
            print(line, file=sys.stderr, flush=True)
        if _is_built(out, made_from, config.overwrite):
            return False
        if _was_sealed(folder, made_from, config.overwrite):
            publish(folder, out)
            return False
        header = {"origin": made_from, "command": command, "left_out": left_out.counts}
        if seen is not None:
            header["seen"] = str(seen.keys)
        if _goes_on(folder, made_from, config.overwrite):
            for leftover in ("claims", "scratch", "ranks"):  # left by workers that no longer run
                _delete_work(folder, leftover)
        elif not _was_mended(folder, header, config):
            _begin(folder, tokenizer, config, header)
        return True
    except BaseException:
        if new:
            delete_contents(folder, named_by_build, keep=[MARK])
        raise
    finally:
        delete_file(work / _NEW_PLAN)
        delete_file(unsealed(work / _NEW_PLAN))
        delete_if_empty(work)


def _check_loss(name: str, source: SourceConfig) -> None:
    """Raise ConfigError if it cannot be known which tokens of a source count in the loss."""
    if source.loss is None:
        return
    if edits(source.filters):
        raise ConfigError(
            f"sources.{name}.loss: the filters c4 and pii change texts, so the characters that count could not be "
            f"found again; remove these filters, or clean the texts before the build"
        )
    if source.loss.template is not None:
        try:
            open_template(Path(source.loss.template))
        except ConfigError as error:
            raise ConfigError(f"sources.{name}.{error}") from error


def _delete_work(folder: Path, name: str) -> None:
    """Delete one of the folders inside the work folder, if it exists."""
    if (folder / WORK / name).is_dir():
        delete_made(folder / WORK / name, lambda inside: named_by_build(f"{WORK}/{name}/{inside}"))


def _begin(folder: Path, tokenizer: Tokenizer, config: BuildConfig, header: dict[str, Any]) -> None:
    """Empty the folder except for the new plan, and write this build's plan after everything else."""

    def warn(message: str) -> None:
        print(f"warning: {message}", file=sys.stderr, flush=True)

    check_agreement(tokenizer, config.eod_token is None, warn)
    work = folder / WORK
    # Delete these two files first. Without them nothing mistakes a half-deleted folder for a build.
    proofs = (MANIFEST, f"{WORK}/{PLAN}")
    delete_contents(folder, named_by_build, first=proofs, keep=(MARK, f"{WORK}/{_NEW_PLAN}"))
    (work / "quarantine").mkdir()
    save(tokenizer, folder / TOKENIZER)
    planned = Plan(work / _NEW_PLAN)
    samples = _first_documents(planned.unit(0), config) if len(planned) else []
    engine = choose(config.backend, tokenizer, samples, warn)
    _write_plan(work, planned, {**header, "engine": engine})


def _write_plan(work: Path, planned: Plan, header: dict[str, Any]) -> None:
    write_plan(work / PLAN, (planned.unit(number) for number in range(len(planned))), header)


def _first_documents(unit: Unit, config: BuildConfig) -> list[str]:
    records = read(unit.pieces[0], config.sources[unit.source], config.max_document_bytes, xxhash.xxh3_128())
    texts, left = [], PARITY_CHARACTERS  # few, because the reference is slow and each unit is sampled again later
    for record in islice(records, PARITY_DOCUMENTS):
        text = record.text or ""
        if len(text) <= left:
            texts.append(text)
            left -= len(text)
    return texts


def _was_sealed(folder: Path, made_from: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder is finished and only the last step is missing, which gives it its final name.

    Raises ConfigError if the folder holds another finished build.
    """
    if not (folder / MANIFEST).is_file():
        return False
    other = read_manifest(folder).provenance.get("origin")
    if other != made_from and not overwrite:
        what = f"other {_difference(other, made_from)}" if other else "other token files"
        raise ConfigError(
            f"{folder} holds a finished build from {what}, which was not renamed yet; restore these to rename it, "
            f"or give overwrite=true to build again"
        )
    return bool(other == made_from)


def _goes_on(folder: Path, made_from: dict[str, Any], overwrite: bool) -> bool:
    """Whether the folder holds the beginning of this build.

    Raises ConfigError if it holds units of another build, unless that build failed and only its inputs have changed
    since.
    """
    work = folder / WORK
    if (work / PLAN).is_file():
        other = Plan(work / PLAN).header["origin"]
        if other == made_from:
            return True
        begun = any(any((work / stage.name).glob("*.json")) for stage in STAGES)
        mended = (work / FAILED).is_file() and {**other, "plan": ""} == {**made_from, "plan": ""}
        if begun and not overwrite and not mended:
            raise ConfigError(
                f"{folder} holds an unfinished build from other {_difference(other, made_from)}; restore these to "
                f"finish it, or give overwrite=true to build again"
            )
    return False


def _was_mended(folder: Path, header: dict[str, Any], config: BuildConfig) -> bool:
    """Continue a build that failed and whose inputs have changed since. Keeps the finished units with unchanged inputs.

    Returns False if there is no such build, or if its units depend on each other.
    """
    work = folder / WORK
    depending = config.deduplicate != "none" or config.shuffle or is_capped(config)
    if not (work / PLAN).is_file() or depending or config.overwrite:
        return False
    old, new = Plan(work / PLAN), Plan(work / _NEW_PLAN)
    if {**old.header["origin"], "plan": ""} != {**header["origin"], "plan": ""}:
        return False
    for number in range(len(old)):
        if number >= len(new) or old.unit(number) != new.unit(number):
            delete_file(work / "shards" / f"{number:06d}.json")
            for suffix in ("jsonl", "dropped.jsonl"):
                delete_file(work / "quarantine" / f"{number:06d}.{suffix}")
            for split in SPLITS:
                for path in (*folder.glob(f"{split}-{number:05d}.*"), *folder.glob(f"{split}-{number:05d}-*")):
                    delete_file(path)
    for leftover in ("claims", "scratch", "ranks"):
        _delete_work(folder, leftover)
    _write_plan(work, new, {**header, "engine": old.header["engine"]})
    delete_file(work / FAILED)
    return True


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    known = {**one["config"], **other["config"]}
    keys = [key for key in known if one["config"].get(key) != other["config"].get(key)]
    if one.get("cleaning") != other.get("cleaning"):
        keys.append("the rules of filters and near duplicates of another version of this program")
    if one["tokenizer"] != other["tokenizer"]:
        keys.append("tokenizer files")
    if one["ends"] != other["ends"]:
        keys.append("tokens that begin and end documents")
    if one.get("seen") != other.get("seen"):
        keys.append("documents of the set that it adds to")
    if one.get("templates") != other.get("templates"):
        keys.append("chat templates")
    if one.get("filters") != other.get("filters"):
        keys.append("files that filters read")
    return f"settings ({', '.join(keys)})" if keys else "inputs"


def _is_built(out: Path, made_from: dict[str, Any], overwrite: bool) -> bool:
    """Whether `out` is already the result. Raises ConfigError if it holds something else that must not be replaced."""
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
