"""Folders of shards put together without reading a text again: `ponder-data append` and `ponder-data merge`.

The shards of the result are the very files of the sets, by hard links (copies where the file system has none), and the
first set's keep their names. So what was there keeps its bytes, and a document keeps its side of the split, which its
text alone decides. The result is made beside `out` and given its name in one step, as a build is. Killed anywhere, the
same command goes on.
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

APPENDING = ".appending"  # ends the name of the folder in which new files become shards first
# what all documents of a set have in common; `out` is not the user's to say here
_OF_THE_SET = ("tokenizer", "eod_token", "append_eod", "bos_token", "special_tokens_in_text")
_JOINED = (INPUTS, QUARANTINE, DROPPED)  # files beside the shards, of one set behind those of the other
_NAME = re.compile(r"([a-z]+)-(\d+)(.*)")


def append(folder: Path, settings: Sequence[str], command: str) -> Manifest | None:
    """Add new files to a set, with the tokenizer, ends and split that it has; None on ranks of MPI above 0.

    Where the set was built with deduplicate, new documents that are equal, or nearly equal, to its own are left out.

    Args:
        settings: `key=value` of a build: the sources, and what may differ from document to document.

    Raises:
        ConfigError, ShardError: the set was not made by a build; a setting is the set's; a file is in it already.
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
    """Make the folder `out` of several sets, which stay as they are.

    Args:
        allow_duplicates: also of sets that have files or documents in common.

    Raises:
        ConfigError, ShardError: sets of different tokenizers, ends or splits; a file or, where they were built with
            deduplicate, a document is in two of them; `out` exists.
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
    """Make the folder `out` of a set as it was before its last appends, for a run that began with it.

    Raises:
        ConfigError, ShardError: the set has not had so many appends; `out` exists.
    """
    now = _opened(folder.resolve())
    grown = now.manifest.provenance.get("grown", [])
    if not 0 < appends <= len(grown):
        raise ConfigError(f"merge: --without-last is {appends}; {folder} has had {len(grown)} appends; give 1 to that")
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
    """What stands at `out` if it is made of these sets. Raises ConfigError if it is anything else, or where it is one
    of the places of what is read."""
    out = out.resolve()
    if within := next((one for one in read for place in places(out) if one.folder.is_relative_to(place)), None):
        raise ConfigError(f"merge: {within.folder} lies in {out} or where that is made; choose another folder to make")
    if not out.exists() or not any(out.iterdir()):
        return None
    made = read_manifest(out) if (out / MANIFEST).is_file() else None
    if made is None or made.provenance.get("origin") != _origin([one.manifest for one in sets]):
        raise ConfigError(f"merge: {out} exists; choose another folder to make")
    return made


def _give_name(folder: Path) -> None:
    """Finish what was killed between taking the name from the set as it was and giving it to the grown one."""
    _, partial, replaced = places(folder)
    if not folder.exists() and all((place / MANIFEST).is_file() for place in (partial, replaced)):
        with workspace(folder):
            publish(partial, folder)


def _config(folder: Path, new: Path, settings: Sequence[str]) -> BuildConfig:
    """The build of the new files alone."""
    setting(open_shards(folder, check=False), "deduplicate")
    fixed = (*_OF_THE_SET, *OF_THE_SPLIT, "out")
    for given in settings:
        if (key := given.partition("=")[0].strip()) in fixed:
            raise ConfigError(f"append: {key} is what {folder} has; leave it out")
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


def _before(one: ShardSet) -> dict[str, Any]:
    """What a set is before an append, so that it can be made again, and runs can tell what became of it."""
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
    """Make `out` of the sets, in their order.

    grown: what `out` was before each append; sizes: how much of the files beside the shards is taken; None: all.
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


def _join(name: str, sets: Sequence[ShardSet], partial: Path, sizes: Mapping[str, int] | None) -> bool:
    """Write a file beside the shards, that of each set behind the other's; False where none has it."""
    parts = [one.folder / name for one in sets if name in one.manifest.files]
    if not parts:
        return False
    join(parts, partial / name, None if sizes is None else sizes[name])
    return True


def _join_keys(sets: Sequence[ShardSet], partial: Path) -> bool:
    """Write the keys of all documents; False where some sets have none, or other ones."""
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
    """That of the first set, with those of the others."""
    flat: list[dict[str, Any]] = []
    for manifest in manifests:
        own = dict(manifest.provenance["origin"])
        others = own.pop("with", [])
        flat += [own, *others]
    return {**flat[0], "with": flat[1:]} if len(flat) > 1 else flat[0]


def _provenance(manifests: Sequence[Manifest], command: str) -> dict[str, Any]:
    """What made all of it: counts are added up, by source."""
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
    """Add numbers to those of the same names, however deep they lie: by source, by reason."""
    for name, count in more.items():
        if isinstance(count, Mapping):
            _add(counts.setdefault(name, {}), count)
        else:
            counts[name] = counts.get(name, 0) + count


def _commands(provenance: Mapping[str, Any]) -> list[str]:
    """Those that built the sets."""
    return list(provenance.get("commands", [provenance["command"]]))
