"""Folders of shards put together without reading a text again: `ponder-data append` and `ponder-data merge`.

The shards of the result are the very files of the sets, by hard links (copies where the file system has none), and the
first set's keep their names. So what was there keeps its bytes, and a document keeps its side of the split, which its
text alone decides. The result is made beside `out` and given its name in one step, as a build is. Killed anywhere, the
same command goes on.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.build.pipeline import build
from data_pipeline.config import BuildConfig
from data_pipeline.read.sources import LeftOut
from data_pipeline.read.units import units
from data_pipeline.write.manifest import BEFORE, DROPPED, INPUTS, QUARANTINE
from data_pipeline.write.output import (
    check_replaceable,
    delete_set,
    named_by_build,
    places,
    publish,
    unfinished,
    workspace,
)
from ponder_scale.errors import ConfigError
from ponder_scale.files.delete import MARK, delete_contents
from ponder_scale.files.write import copy_file, hash_file, sync_file, sync_folder
from ponder_scale.settings import load
from ponder_scale.shards.format import TOKENIZER, ShardSet, open_shards
from ponder_scale.shards.manifest import MANIFEST, Manifest, ShardInfo, read_manifest, seal

APPENDING = ".appending"  # ends the name of the folder in which new files become shards first
# what all documents of a set have in common; `out` and `overwrite` are not the user's to say here
_OF_THE_SET = ("tokenizer", "eod_token", "append_eod", "bos_token", "special_tokens_in_text")
_OF_THE_SPLIT = ("heldout_fraction", "split_by", "seed")
_SIDE_FILES = (INPUTS, QUARANTINE, DROPPED)
_NAME = re.compile(r"([a-z]+)-(\d+)(.*)")


def append(folder: Path, settings: Sequence[str], command: str) -> Manifest | None:
    """Add new files to a set, with the tokenizer, ends and split that it has; None on ranks of MPI above 0.

    Args:
        settings: `key=value` of a build: the sources, and what may differ from document to document.

    Raises:
        ConfigError, ShardError: the set was not made by a build; a setting is the set's; a file is in it already.
    """
    folder = folder.resolve()
    new = folder.with_name(folder.name + APPENDING)
    config = _config(folder, new, settings)
    before = _opened(folder)
    check_replaceable(folder, replaces=True)
    if _was_added(before, new):
        repeated = read_manifest(new).provenance["command"] == command
        delete_set(new)
        if repeated:
            return before.manifest
    _check_new(before, config)
    built = build(config, command)
    if built is None:
        return None
    manifest = _put_together(folder, [before, _opened(new)], command, replaces=True)
    delete_set(new)
    return manifest


def merge(out: Path, folders: Sequence[Path], command: str) -> Manifest:
    """Make the folder `out` of several sets, which stay as they are.

    Raises:
        ConfigError, ShardError: sets of different tokenizers, ends or splits; a file is in two of them; `out` exists.
    """
    out = out.resolve()
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("merge: a set is named twice; name each once")
    sets = [_opened(folder.resolve()) for folder in folders]
    if within := next((one for one in sets for place in places(out) if one.folder.is_relative_to(place)), None):
        raise ConfigError(f"merge: {within.folder} lies in {out} or where that is made; choose another folder to make")
    if out.exists() and any(out.iterdir()):
        made = read_manifest(out) if (out / MANIFEST).is_file() else None
        if made is not None and made.provenance.get("origin") == _origin([one.manifest for one in sets]):
            return made
        raise ConfigError(f"merge: {out} exists; choose another folder to make")
    return _put_together(out, sets, command, replaces=False)


def _config(folder: Path, new: Path, settings: Sequence[str]) -> BuildConfig:
    """The build of the new files alone."""
    origin = read_manifest(folder).provenance.get("origin")
    if not isinstance(origin, dict) or "config" not in origin:
        raise ConfigError(f"append: {folder} was not made by `ponder-data build`; adopt all token files in one set")
    fixed = (*_OF_THE_SET, *_OF_THE_SPLIT, "out", "overwrite")
    for setting in settings:
        if (key := setting.partition("=")[0].strip()) in fixed:
            raise ConfigError(f"append: {key} is what {folder} has; leave it out")
    known = {**BEFORE, **origin["config"], "tokenizer": str(folder / TOKENIZER), "out": str(new)}
    if not any(setting.startswith("sources") for setting in settings):
        raise ConfigError("append: name the new files: sources.NAME.kind=jsonl sources.NAME.path=FILE")
    kept = [f"{key}={_as_typed(value)}" for key, value in known.items() if key != "sources"]
    return load(BuildConfig, None, [*kept, *settings])


def _as_typed(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _opened(folder: Path) -> ShardSet:
    shards = open_shards(folder)
    for info in _infos(shards.manifest):
        for name in info.files:
            if (folder / name).is_symlink():
                raise ConfigError(
                    f"{folder} was adopted: {name} is a link to another program's file; adopt all of those in one set"
                )
    return shards


def _infos(manifest: Manifest) -> Iterator[ShardInfo]:
    return chain.from_iterable(manifest.splits.values())


def _was_added(before: ShardSet, new: Path) -> bool:
    """Whether the new files are in the set already and only their own folder has been left."""
    if not (new / MANIFEST).is_file():
        return False
    return read_manifest(new).provenance["origin"] in before.manifest.provenance["origin"].get("with", ())


def _check_new(before: ShardSet, config: BuildConfig) -> None:
    """Raise ConfigError where a file of the build is in the set already, or a source's weight does not fit."""
    there = {str(Path(line["file"]).resolve()): line["file"] for line in _lines(before.folder / INPUTS)}
    for unit in units(config.sources, config.shard_bytes, LeftOut(), places(Path(config.out))):
        for piece in unit.pieces:
            if (path := str(Path(piece.path).resolve())) in there:
                raise ConfigError(f"append: {there[path]} is in {before.folder} already; name new files only")
    weights = {name: source.weight for name, source in config.sources.items() if source.weight is not None}
    if bool(weights) != bool(before.manifest.weights):
        has = "weights" if before.manifest.weights else "no weights"
        raise ConfigError(
            f"append: the sources of {before.folder} have {has}; give the new ones the same: sources.NAME.weight"
        )
    for name, weight in weights.items():
        if before.manifest.weights.get(name, weight) != weight:
            raise ConfigError(
                f"append: sources.{name}.weight is {weight:g}, in {before.folder} it is "
                f"{before.manifest.weights[name]:g}; give that, or another name"
            )
    if config.deduplicate != "none":
        print(
            f"warning: deduplicate={config.deduplicate} compares the new documents with each other, not with those of "
            f"{before.folder}, whose texts are not read again",
            file=sys.stderr,
            flush=True,
        )


def _put_together(out: Path, sets: Sequence[ShardSet], command: str, *, replaces: bool) -> Manifest:
    """Make `out` of the sets, in their order."""
    _check_alike(sets)
    check_replaceable(out, replaces)
    with workspace(out):
        partial = unfinished(out)
        delete_contents(partial, named_by_build, keep=[MARK])
        splits: dict[str, list[ShardInfo]] = {}
        numbers = 0
        for one in sets:
            numbers = _take(one, partial, numbers, splits)
        (partial / TOKENIZER).mkdir()
        first = sets[0].folder
        for path in sorted((first / TOKENIZER).iterdir()):
            _link(path, partial / TOKENIZER / path.name)
        joined = [name for name in _SIDE_FILES if _join([one.folder / name for one in sets], partial / name)]
        files = [*(partial / name for name in joined), *sorted((partial / TOKENIZER).iterdir())]
        sync_folder(partial / TOKENIZER)
        manifest = replace(
            sets[0].manifest,
            splits=splits,
            weights=_weights(sets),
            files={path.relative_to(partial).as_posix(): hash_file(path) for path in files},
            provenance=_provenance([one.manifest for one in sets], command),
            version=max(one.manifest.version for one in sets),
        )
        sync_folder(partial)
        seal(partial, manifest)
        open_shards(partial)
        publish(partial, out)
    return manifest


def _take(one: ShardSet, partial: Path, numbers: int, splits: dict[str, list[ShardInfo]]) -> int:
    """Link the shards of a set, numbered from `numbers` on; the first number that is free after them."""
    free = numbers
    for split, infos in one.manifest.splits.items():
        taken = splits.setdefault(split, [])
        for info in infos:
            found = _NAME.fullmatch(info.name)
            assert found is not None, info.name
            number = numbers + int(found[2])
            moved = replace(info, name=f"{found[1]}-{number:05d}{found[3]}")
            for old, new in zip(info.files, moved.files, strict=True):
                _link(one.folder / old, partial / new)
            taken.append(moved)
            free = max(free, number + 1)
    return free


def _link(old: Path, new: Path) -> None:
    """The same file under another name; a copy where the file system has no hard links, or not for this file."""
    try:
        os.link(old, new)
    except OSError:
        copy_file(old, new)
        sync_file(new)


def _join(parts: Sequence[Path], whole: Path) -> bool:
    """Write the parts that are there one after the other; False where none is."""
    parts = [part for part in parts if part.is_file()]
    if not parts:
        return False
    with whole.open("wb") as stream:
        for part in parts:
            with part.open("rb") as content:
                shutil.copyfileobj(content, stream)
    sync_file(whole)
    return True


def _check_alike(sets: Sequence[ShardSet]) -> None:
    """Raise ConfigError unless all sets are of one tokenizer, with the same ends and the same split."""
    for one, other in pairwise(sets):
        places = f"{one.folder} and {other.folder}"
        for key in ("tokenizer", "dtype", "vocab_size", "eod_id", "bos_id"):
            mine, theirs = (getattr(each.manifest, key) for each in (one, other))
            if mine != theirs:
                raise ConfigError(f"{places} differ in {key} ({mine} and {theirs}); they cannot be one set")
        for key in ("special_tokens_in_text", *_OF_THE_SPLIT):
            mine, theirs = (_setting(each.manifest, key) for each in (one, other))
            if mine != theirs:
                raise ConfigError(f"{places} were built with {key} {mine} and {theirs}; they cannot be one set")
        if bool(one.manifest.weights) != bool(other.manifest.weights):
            raise ConfigError(
                f"{places}: the sources of one have weights, those of the other have none; build one again"
            )
    seen: dict[tuple[str, int, int], Path] = {}
    for one in sets:
        for piece in {(line["file"], line["begin"], line["end"]) for line in _lines(one.folder / INPUTS)}:
            if piece in seen:
                where = f"{seen[piece]} and in {one.folder}"
                raise ConfigError(f"{piece[0]} is in {where}; its documents would be there twice")
            seen[piece] = one.folder


def _setting(manifest: Manifest, key: str) -> Any:
    origin = manifest.provenance.get("origin")
    if not isinstance(origin, dict) or "config" not in origin:
        raise ConfigError("merge: a set was not made by `ponder-data build`; adopt all token files in one set")
    return {**BEFORE, **origin["config"]}.get(key)


def _weights(sets: Sequence[ShardSet]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for one in sets:
        for name, weight in one.manifest.weights.items():
            if weights.setdefault(name, weight) != weight:
                raise ConfigError(
                    f"the source {name} has the weight {weights[name]:g} in one set and {weight:g} in another"
                )
    return weights


def _origin(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """That of the first set, with those of the others."""
    flat: list[dict[str, Any]] = []
    for manifest in manifests:
        own = dict(manifest.provenance["origin"])
        others = own.pop("with", [])
        flat += [own, *others]
    return {**flat[0], "with": flat[1:]}


def _provenance(manifests: Sequence[Manifest], command: str) -> dict[str, Any]:
    """What made all of it: counts are added up, by source."""
    sources: dict[str, Counter[str]] = {}
    drops: dict[str, Counter[str]] = {}
    engines: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    for manifest in manifests:
        made = manifest.provenance
        engines.update(made.get("engines", {}))
        left_out.update(made.get("left_out", {}))
        for name, counts in made["sources"].items():
            sources.setdefault(name, Counter()).update({key: n for key, n in counts.items() if key != "drops"})
            drops.setdefault(name, Counter()).update(counts["drops"])
    counted = {name: {**counts, "drops": dict(sorted(drops[name].items()))} for name, counts in sources.items()}
    last = manifests[-1].provenance
    return {
        "command": command,
        "commands": [line for manifest in manifests for line in _commands(manifest.provenance)],
        "origin": _origin(manifests),
        "sources": counted,
        "engines": dict(sorted(engines.items())),
        **({"left_out": dict(left_out)} if left_out else {}),
        **{key: last[key] for key in ("python", "packages") if key in last},
    }


def _commands(provenance: Mapping[str, Any]) -> list[str]:
    """Those that built the sets."""
    return list(provenance.get("commands", [provenance["command"]]))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open("rb") as stream:
            yield from map(orjson.loads, stream)
