"""Check that sets of token shards can be combined, and find what occurs in more than one of them."""

from __future__ import annotations

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import xxhash

from data_pipeline.clean.dedup import open_keys, unite
from data_pipeline.config import BuildConfig
from data_pipeline.document import Piece
from data_pipeline.read.readers import read
from data_pipeline.read.sources import LeftOut, files
from data_pipeline.write.manifest import BEFORE, INPUTS, KEYS
from data_pipeline.write.output import places
from ponder_scale.errors import ConfigError, UserError
from ponder_scale.shards.format import ShardSet
from ponder_scale.shards.manifest import Manifest

OF_THE_SPLIT = ("heldout_fraction", "split_by", "seed")


def setting(shards: ShardSet, key: str) -> Any:
    """A setting of the build that made a set. Raises ConfigError if no build made it."""
    origin = shards.manifest.provenance.get("origin")
    if not isinstance(origin, dict) or "config" not in origin:
        raise ConfigError(
            f"{shards.folder} was not made by `ponder-data build`, so nothing says which documents it holds out; adopt "
            f"all token files in one set"
        )
    return {**BEFORE, **origin["config"]}.get(key)


def check_new(before: ShardSet, config: BuildConfig) -> None:
    """Raise ConfigError if new files cannot be added to a set.

    The reasons are a file that is already in the set, a source weight that does not fit, and duplicates that cannot be
    found.
    """
    _check_files(before, config)
    weights = {name: source.weight for name, source in config.sources.items() if source.weight is not None}
    if bool(weights) != bool(before.manifest.weights):
        has = "weights" if before.manifest.weights else "no weights"
        raise ConfigError(
            f"append: the sources of {before.folder} have {has}, so the new ones need the same; "
            f"set or remove sources.NAME.weight"
        )
    for name, weight in weights.items():
        if before.manifest.weights.get(name, weight) != weight:
            raise ConfigError(
                f"append: sources.{name}.weight is {weight:g}, in {before.folder} it is "
                f"{before.manifest.weights[name]:g}; give that, or another name"
            )
    _check_deduplicate(before, config)


def _check_deduplicate(before: ShardSet, config: BuildConfig) -> None:
    own, wanted = setting(before, "deduplicate"), config.deduplicate
    if own == wanted and own != "none" and not (before.folder / KEYS).is_file():
        raise ConfigError(
            f"deduplicate is {wanted}, but {before.folder} has no {KEYS} to compare new documents with, because "
            f"older builds wrote none; build it again, or give deduplicate=none to take every new document"
        )
    if own not in ("none", wanted) and wanted != "none":
        raise ConfigError(
            f"append: deduplicate is {wanted}, in {before.folder} it is {own}; leave it out, or give "
            f"deduplicate=none to take every new document"
        )
    if own != wanted:
        what = "are compared with each other only" if own == "none" else "are compared with nothing"
        print(
            f"warning: deduplicate is {wanted}, in {before.folder} it is {own}: the new documents {what}",
            file=sys.stderr,
            flush=True,
        )


def _check_files(before: ShardSet, config: BuildConfig) -> None:
    """Raise ConfigError for a file that is already in the set: one with the same name, or with equal size and bytes.

    Files of folders are left to `check_repeated`, because they are many and equal ones are common.
    """
    first: dict[tuple[str, str], dict[str, Any]] = {}
    sizes: Counter[tuple[str, str]] = Counter()
    for line in lines(before.folder / INPUTS):
        sizes[line["source"], line["file"]] += line["bytes"]
        first.setdefault((line["source"], line["file"]), line)
    kinds, named, of_size = _kinds([before.manifest]), {}, defaultdict(list)
    for (source, name), line in first.items():
        if "folder" not in kinds[source]:
            named[name] = line
            if "://" not in name:
                # for a relative name this is a guess, so the bytes decide
                named.setdefault(str(Path(name).resolve()), line)
            of_size[sizes[source, name]].append(line)
    for file in files(config.sources, LeftOut(), places(Path(config.out))):
        if config.sources[file.source].kind == "folder" or not file.file_size:
            continue
        known = named.get(str(Path(file.path).resolve())) or named.get(file.name)
        alike = [line for line in of_size[file.size] if config.sources[file.source].kind in kinds[line["source"]]]
        if known is not None and (Path(known["file"]).is_absolute() or "://" in known["file"]):
            found: dict[str, Any] | None = known
        else:
            candidates = [*alike, *([known] if known is not None else [])]
            found = next((line for line in candidates if _begins_with(file, line, config)), None)
        if found is not None:
            as_what = "" if found["file"] == file.name else f" as {found['file']}"
            raise ConfigError(f"append: {file.name} is in {before.folder} already{as_what}; name new files only")


def _begins_with(file: Piece, line: Mapping[str, Any], config: BuildConfig) -> bool:
    """Whether this file begins with the same bytes as the first piece of a file that was read before."""
    whole = xxhash.xxh3_128()
    piece = replace(file, begin=line["begin"], end=line["end"])
    try:
        for _ in read(piece, config.sources[file.source], config.max_document_bytes, whole):
            pass
    # the file has no such part, or the build will report the error
    except (UserError, OSError, ValueError, IndexError):
        return False
    return whole.hexdigest() == line["xxh3"]


def check_alike(sets: Sequence[ShardSet]) -> None:
    """Raise ConfigError unless all sets have the same tokenizer, begin and end tokens, and split."""
    for one, other in pairwise(sets):
        both = f"{one.folder} and {other.folder}"
        for key in ("tokenizer", "dtype", "vocab_size", "eod_id", "bos_id"):
            mine, theirs = (getattr(each.manifest, key) for each in (one, other))
            if mine != theirs:
                raise ConfigError(f"{both} differ in {key} ({mine} and {theirs}); they cannot be one set")
        for key in ("special_tokens_in_text", *OF_THE_SPLIT):
            mine, theirs = (setting(each, key) for each in (one, other))
            if mine != theirs:
                raise ConfigError(f"{both} were built with {key} {mine} and {theirs}; they cannot be one set")
        if bool(one.manifest.weights) != bool(other.manifest.weights):
            raise ConfigError(f"{both}: the sources of one have weights, those of the other have none; build one again")


def check_repeated(sets: Sequence[ShardSet]) -> None:
    """Raise ConfigError if the same input bytes were read for two of the sets.

    Equal files are common in folders. A folder is refused only if all its files are in another set. Otherwise a warning
    says how many are.
    """
    seen: dict[tuple[int, str], tuple[Path, str]] = {}
    for one in sets:
        kinds, found = _kinds([one.manifest]), list(lines(one.folder / INPUTS))
        equal: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in found:
            if line["bytes"] and (line["bytes"], line["xxh3"]) in seen:
                equal[line["source"]].append(line)
        for source, some in equal.items():
            folder, name = seen[some[0]["bytes"], some[0]["xxh3"]]
            count = sum(line["source"] == source and line["bytes"] > 0 for line in found)
            if "folder" not in kinds[source] or len(some) == count:
                also = "" if name == some[0]["file"] else f" as {name}"
                raise ConfigError(
                    f"{some[0]['file']} is in {one.folder} and in {folder}{also}; its documents would be there twice"
                )
            print(
                f"warning: {len(some):,} of {count:,} files of {source} are in {folder} too, the first is "
                f"{some[0]['file']}; their documents are there twice",
                file=sys.stderr,
                flush=True,
            )
        for line in found:
            seen.setdefault((line["bytes"], line["xxh3"]), (one.folder, line["file"]))


def check_documents(sets: Sequence[ShardSet]) -> None:
    """Raise ConfigError if sets were built with deduplicate and share documents, or if that cannot be known."""
    ways = [setting(one, "deduplicate") for one in sets]
    remedy = "append the files of one to the other, which leaves duplicates out, or give --allow-duplicates"
    for one, way in zip(sets, ways, strict=True):
        if way != ways[0]:
            raise ConfigError(
                f"{sets[0].folder} and {one.folder} were built with deduplicate {ways[0]} and {way}, so they may have "
                f"documents in common; {remedy}"
            )
        if way != "none" and KEYS not in one.manifest.files:
            raise ConfigError(
                f"{one.folder} was built with deduplicate and has no {KEYS}, so it may have documents in common with "
                f"the others; {remedy}"
            )
    if ways[0] != "none":
        with Path(os.devnull).open("wb") as nowhere:
            shared = unite([open_keys(one.folder / KEYS) for one in sets], nowhere)
        if shared:
            what = "texts" if ways[0] == "exact" else "keys of nearly equal texts"
            folders = ", ".join(str(one.folder) for one in sets)
            raise ConfigError(
                f"{folders}: built with deduplicate={ways[0]}, and {shared:,} {what} are in more than one; {remedy}"
            )


def _kinds(manifests: Sequence[Manifest]) -> dict[str, set[str]]:
    """The kinds that sources of each name had in builds and appends."""
    kinds: dict[str, set[str]] = defaultdict(set)
    for manifest in manifests:
        origin = manifest.provenance["origin"]
        for one in (origin, *origin.get("with", ())):
            for name, source in one["config"]["sources"].items():
                kinds[name].add(source["kind"])
    return kinds


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a .jsonl file. Yields nothing if there is no file."""
    if path.is_file():
        with path.open("rb") as stream:
            yield from map(orjson.loads, stream)
