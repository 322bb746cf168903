"""Combine folders of shards without reading text again: `ponder-data append` and `ponder-data merge`.

The shards of the result are the same files as those of the sets, through hard links. They are copies if the file system
has no hard links. The first set's shards keep their names. Existing data therefore keeps its bytes, and a document
keeps its side of the split, which depends on its text alone. As in a build, the result is made beside `out` and renamed
in one step. If it is killed at any point, run the same command again to continue.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from data_pipeline.build.begin import Added
from data_pipeline.build.pipeline import run
from data_pipeline.clean.dedup import open_keys, unite
from data_pipeline.commands.alike import OF_THE_SPLIT, check_alike, check_documents, check_new, check_repeated, setting
from data_pipeline.config import BuildConfig
from data_pipeline.write.manifest import BEFORE, DROPPED, INPUTS, KEYS, QUARANTINE
from data_pipeline.write.output import (
    check_replaceable,
    delete_set,
    join,
    named_by_build,
    places,
    publish,
    unfinished,
    workspace,
)
from ponder_scale.errors import ConfigError
from ponder_scale.files.delete import MARK, delete_contents
from ponder_scale.files.write import copy_file, hash_file, sync, sync_file, sync_folder
from ponder_scale.settings import load
from ponder_scale.shards.format import TOKENIZER, ShardSet, open_shards
from ponder_scale.shards.manifest import MANIFEST, Manifest, ShardInfo, read_manifest, seal

APPENDING = ".appending"  # suffix of the folder in which new files first become shards
# Settings that all documents of a set share. `out` is also fixed here.
_OF_THE_SET = ("tokenizer", "eod_token", "append_eod", "bos_token", "special_tokens_in_text")
_JOINED = (INPUTS, QUARANTINE, DROPPED)  # files beside the shards; those of the sets are joined in order
_NAME = re.compile(r"([a-z]+)-(\d+)(.*)")


def append(folder: Path, settings: Sequence[str], command: str) -> Manifest | None:
    """Add new files to a set, with the set's tokenizer, end tokens and split. Returns None on MPI ranks above 0.

    If the set was built with deduplicate, new documents equal or nearly equal to its own are left out.

    Args:
        settings: `key=value` settings of a build: the sources, and settings that may differ between documents.

    Raises:
        ConfigError, ShardError: no build made the set, a setting is fixed by the set, or the set already has a file.
    """
    folder = folder.resolve()
    _give_name(folder)
    new = folder.with_name(folder.name + APPENDING)
    config = _config(folder, new, settings)
    known = read_manifest(folder).files
    seen = Added(folder / KEYS, known[KEYS]) if config.deduplicate != "none" and KEYS in known else None
    done = False

    def first() -> bool:
        nonlocal done
        before = _opened(folder)
        check_replaceable(folder, replaces=True)
        if _was_added(before, new):
            done = read_manifest(new).provenance["command"] == command
            delete_set(new)
        if not done:
            check_new(before, config)
        return not done

    if run(config, command, first, seen) is None:
        return None
    if done:
        return read_manifest(folder)
    sets = [_opened(folder), _opened(new)]
    try:
        check_repeated(sets)
    except ConfigError:
        delete_set(new)
        raise
    grown = [*sets[0].manifest.provenance.get("grown", ()), _before(sets[0])]
    manifest = _put_together(folder, sets, command, replaces=True, grown=grown)
    delete_set(new)
    return manifest


def merge(out: Path, folders: Sequence[Path], command: str, *, allow_duplicates: bool = False) -> Manifest:
    """Create the folder `out` from several sets. The sets are not changed.

    Args:
        allow_duplicates: also accept sets that share files or documents.

    Raises:
        ConfigError, ShardError: the sets differ in tokenizer, end tokens or split. Two of them share a file or, if they
            were built with deduplicate, a document. `out` exists.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("merge: a set is named twice; name each once")
    sets = [_opened(folder.resolve()) for folder in folders]
    if (made := _made(out, sets, sets)) is not None:
        return made
    check_alike(sets)
    if not allow_duplicates:
        check_repeated(sets)
        check_documents(sets)
    return _put_together(out.resolve(), sets, command, replaces=False)


def before_appends(out: Path, folder: Path, appends: int, command: str) -> Manifest:
    """Create the folder `out` with a set as it was before its last appends, for a run that began with that set.

    Raises:
        ConfigError, ShardError: the set has had no or fewer appends, or `out` exists.
    """
    now = _opened(folder.resolve())
    grown = now.manifest.provenance.get("grown", [])
    if not grown:
        raise ConfigError(
            f"merge: --without-last is {appends}; {folder} has had no append, so nothing can be left out; use {folder} "
            "as it is"
        )
    if not 0 < appends <= len(grown):
        raise ConfigError(
            f"merge: --without-last is {appends}; {folder} has had {len(grown)} appends; expected 1 to {len(grown)}"
        )
    was = grown[-appends]
    manifest = replace(
        now.manifest,
        splits={split: infos[: was["shards"].get(split, 0)] for split, infos in now.manifest.splits.items()},
        weights={name: now.manifest.weights[name] for name in was["weights"]},
        files={name: known for name, known in now.manifest.files.items() if name in was["bytes"]},
        provenance={**was["provenance"], "grown": grown[:-appends]},
    )
    then = replace(now, manifest=manifest)
    if (made := _made(out, [now], [then])) is not None:
        return made
    return _put_together(
        out.resolve(), [then], command, replaces=False, grown=manifest.provenance["grown"], sizes=was["bytes"]
    )


def _made(out: Path, read: Sequence[ShardSet], sets: Sequence[ShardSet]) -> Manifest | None:
    """The manifest at `out` if it was made of these sets; None if `out` is free.

    Raises ConfigError if `out` holds anything else, or if it overlaps with a folder that is read.
    """
    out = out.resolve()
    if within := next((one for one in read for place in places(out) if one.folder.is_relative_to(place)), None):
        raise ConfigError(
            f"merge: {within.folder} lies in {out} or in a folder that merge needs for it; choose another"
        )
    if not out.exists() or not any(out.iterdir()):
        return None
    made = read_manifest(out) if (out / MANIFEST).is_file() else None
    if made is None or made.provenance.get("origin") != _origin([one.manifest for one in sets]):
        raise ConfigError(f"merge: {out} exists; choose another folder to create")
    return made


def _give_name(folder: Path) -> None:
    """Finish an append that was killed after it had moved the old set away and before it renamed the grown one."""
    _, partial, replaced = places(folder)
    if not folder.exists() and all((place / MANIFEST).is_file() for place in (partial, replaced)):
        with workspace(folder):
            publish(partial, folder)


def _config(folder: Path, new: Path, settings: Sequence[str]) -> BuildConfig:
    """The configuration of a build of the new files alone."""
    setting(open_shards(folder, check=False), "deduplicate")
    fixed = (*_OF_THE_SET, *OF_THE_SPLIT, "out")
    for given in settings:
        if (key := given.partition("=")[0].strip()) in fixed:
            raise ConfigError(f"append: {key} is fixed by {folder}; leave it out")
    if not any(given.startswith("sources") for given in settings):
        raise ConfigError("append: name the new files: sources.NAME.kind=jsonl sources.NAME.path=FILE")
    built = read_manifest(folder).provenance["origin"]["config"]
    known = {**BEFORE, **built, "tokenizer": str(folder / TOKENIZER), "out": str(new)}
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
                    f"{folder} was adopted, and {name} links to another program's file; adopt all such files in one set"
                )
    return shards


def _infos(manifest: Manifest) -> Iterator[ShardInfo]:
    return chain.from_iterable(manifest.splits.values())


def _was_added(before: ShardSet, new: Path) -> bool:
    """Whether the new files are already in the set and only their own folder remains."""
    if not (new / MANIFEST).is_file():
        return False
    return read_manifest(new).provenance["origin"] in before.manifest.provenance["origin"].get("with", ())


def _before(one: ShardSet) -> dict[str, Any]:
    """A description of a set before an append. It lets you restore the set, and lets runs recognize it."""
    manifest = one.manifest
    return {
        "identity": manifest.identity,
        "shards": {split: len(infos) for split, infos in manifest.splits.items()},
        "weights": sorted(manifest.weights),
        "bytes": {name: (one.folder / name).stat().st_size for name in _JOINED if name in manifest.files},
        "provenance": {key: value for key, value in manifest.provenance.items() if key != "grown"},
    }


def _put_together(
    out: Path,
    sets: Sequence[ShardSet],
    command: str,
    *,
    replaces: bool,
    grown: Sequence[Mapping[str, Any]] = (),
    sizes: Mapping[str, int] | None = None,
) -> Manifest:
    """Create `out` from the sets, in their order.

    grown: descriptions of `out` before each append.
    sizes: bytes to take of each file beside the shards. None takes all.
    """
    check_alike(sets)
    check_replaceable(out, replaces)
    weights, provenance = _weights(sets), _provenance([one.manifest for one in sets], command)
    with workspace(out):
        partial = unfinished(out)
        delete_contents(partial, named_by_build, keep=[MARK])
        splits: dict[str, list[ShardInfo]] = {}
        numbers = 0
        for one in sets:
            numbers = _take(one, partial, numbers, splits)
        (partial / TOKENIZER).mkdir()
        for path in sorted((sets[0].folder / TOKENIZER).iterdir()):
            _link(path, partial / TOKENIZER / path.name)
        joined = [name for name in _JOINED if _join(name, sets, partial, sizes)]
        if _join_keys(sets, partial):
            joined.append(KEYS)
        files = [*(partial / name for name in joined), *sorted((partial / TOKENIZER).iterdir())]
        sync_folder(partial / TOKENIZER)
        manifest = replace(
            sets[0].manifest,
            splits=splits,
            weights=weights,
            files={path.relative_to(partial).as_posix(): hash_file(path) for path in files},
            provenance={**provenance, **({"grown": list(grown)} if grown else {})},
            version=max(one.manifest.version for one in sets),
        )
        sync_folder(partial)
        seal(partial, manifest)
        open_shards(partial)
        publish(partial, out)
    return manifest


def _take(one: ShardSet, partial: Path, numbers: int, splits: dict[str, list[ShardInfo]]) -> int:
    """Link the shards of a set, numbered from `numbers` on. Returns the next free number."""
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
    """Hard-link a file to another name. Copies it if that fails."""
    try:
        os.link(old, new)
    except OSError:
        copy_file(old, new)
        sync_file(new)


def _join(name: str, sets: Sequence[ShardSet], partial: Path, sizes: Mapping[str, int] | None) -> bool:
    """Join a file beside the shards from all sets, in order. Returns False if no set has it."""
    parts = [one.folder / name for one in sets if name in one.manifest.files]
    if not parts:
        return False
    join(parts, partial / name, None if sizes is None else sizes[name])
    return True


def _join_keys(sets: Sequence[ShardSet], partial: Path) -> bool:
    """Join the deduplication keys of all sets. Returns False if a set has none or the sets have different kinds."""
    parts = [one.folder / KEYS for one in sets if KEYS in one.manifest.files]
    if len(parts) < len(sets) or len({setting(one, "deduplicate") for one in sets}) > 1:
        return False
    with (partial / KEYS).open("wb") as stream:
        unite([open_keys(part) for part in parts], stream)
        sync(stream)
    return True


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
    """The origin of the first set, with those of the others in "with"."""
    flat: list[dict[str, Any]] = []
    for manifest in manifests:
        own = dict(manifest.provenance["origin"])
        others = own.pop("with", [])
        flat += [own, *others]
    return {**flat[0], "with": flat[1:]} if len(flat) > 1 else flat[0]


def _provenance(manifests: Sequence[Manifest], command: str) -> dict[str, Any]:
    """The provenance of the combined set. Counts are added up by source."""
    sources: dict[str, Any] = {}
    left_out: dict[str, Any] = {}
    engines: dict[str, Any] = {}
    for manifest in manifests:
        _add(sources, manifest.provenance["sources"])
        _add(left_out, manifest.provenance.get("left_out", {}))
        _add(engines, manifest.provenance.get("engines", {}))
    last = manifests[-1].provenance
    return {
        "command": command,
        "commands": [line for manifest in manifests for line in _commands(manifest.provenance)],
        "origin": _origin(manifests),
        "sources": sources,
        "engines": dict(sorted(engines.items())),
        **({"left_out": left_out} if left_out else {}),
        **{key: last[key] for key in ("python", "packages") if key in last},
    }


def _add(counts: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add numbers to those with the same names, at any depth."""
    for name, count in more.items():
        if isinstance(count, Mapping):
            _add(counts.setdefault(name, {}), count)
        else:
            counts[name] = counts.get(name, 0) + count


def _commands(provenance: Mapping[str, Any]) -> list[str]:
    """The commands that built the sets."""
    return list(provenance.get("commands", [provenance["command"]]))
