"""Record how the shards were made: inputs with hashes, drops by reason, tokenizer, versions, command, configuration."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.clean.filters import LINES, NOT_SAMPLED, identities
from data_pipeline.config import RUNNING, BuildConfig
from data_pipeline.document import BAD, BEHIND, DAMAGED, EMPTY, NO_LABEL, Piece, Record, Unit
from data_pipeline.read.chat import content_of
from data_pipeline.tokenize.tokenizer import Tokenizer
from ponder_scale.errors import ConfigError
from ponder_scale.files.write import hash_file, sync
from ponder_scale.settings import to_dict
from ponder_scale.shards.format import dtype_for
from ponder_scale.shards.manifest import Manifest, ShardInfo, hash_of_json
from ponder_scale.version import __version__

QUARANTINE = "quarantine.jsonl"  # a line for each bad record
DROPPED = "dropped.jsonl"  # a line for each dropped document, if requested
INPUTS = "inputs.jsonl"  # a line for each piece of input read
KEYS = "compared.keys"  # deduplication keys, with which documents that are added later are compared
# Values that reproduce builds from before these keys existed. An origin leaves out a key with such a value, so that it
# equals the origin in an older folder.
BEFORE = {"split_by": "text", "keep_dropped": False}
BEFORE_OF_SOURCE = {"sample": None, "repair": False, "loss": None, "max_documents": None, "max_tokens": None}
CLEANING = 2  # raise it when filters or near-duplicate removal change their results, so that no build mixes both
PACKAGES = ("ponder-scale", "datasets", "isal", "numpy", "orjson", "pyarrow", "sentencepiece", "tokenizers", "xxhash")


class Ledger:
    """Counts what became of the records of one unit, and writes down the bad ones."""

    def __init__(self, unit: Unit, scratch: Path, keep_dropped: bool) -> None:
        """`keep_dropped`: also write down the texts of dropped documents."""
        self.documents = self.tokens = 0  # that were written
        self._source, self._number = unit.source, unit.number
        self._drops: Counter[str] = Counter()
        self._edits: Counter[str] = Counter()
        self._inputs: list[dict[str, Any]] = []
        self._first_bad: list[Any] | None = None
        self._quarantine, self._texts = scratch / "quarantine", scratch / f"{unit.number:06d}.dropped.jsonl"
        self._stream = self._quarantine.open("wb")
        self._dropped = self._texts.open("wb") if keep_dropped else None

    def drop(self, piece: Piece, record: Record) -> None:
        """Count a record that is not a document. Quarantine it if the input is at fault."""
        self._drops[record.reason] += 1
        if record.reason not in (EMPTY, NO_LABEL):
            self._first_bad = self._first_bad or [piece.name, record.offset, record.reason]
            line = {"source": self._source, "file": piece.name, "offset": record.offset, "reason": record.reason}
            self._stream.write(orjson.dumps(line) + b"\n")

    def reject(self, reason: str, record: Record) -> None:
        """Count a document that a filter or deduplication drops."""
        self._drops[reason] += 1
        if self._dropped is not None and reason not in (NOT_SAMPLED, BEHIND):
            line = {"source": self._source, "reason": reason, "text": record.text}
            masked = {} if record.counts is None else {"spans": record.counts}
            self._dropped.write(orjson.dumps({**line, **masked}) + b"\n")

    def edited(self, counts: Mapping[str, int]) -> None:
        """Count what was removed or replaced in a document that is kept."""
        self._edits.update(counts)

    def was_read(self, piece: Piece, digest: str) -> None:
        """Record a piece that was read to its end, with the xxh3-128 of its bytes."""
        line = {"source": self._source, "file": piece.name, "begin": piece.begin, "end": piece.end}
        self._inputs.append({**line, "bytes": piece.size, "xxh3": digest})

    def wrote(self, lengths: Sequence[int]) -> None:
        """Count documents that were written, by their numbers of tokens."""
        self.documents, self.tokens = self.documents + len(lengths), self.tokens + sum(lengths)

    def close(self, folder: Path) -> dict[str, Any]:
        """Give the files their final names in `folder`. Returns the counts, for the journal."""
        for stream in filter(None, (self._stream, self._dropped)):
            with stream:
                sync(stream)
        if self._dropped is not None:
            self._texts.rename(folder / self._texts.name)
        self._quarantine.rename(folder / f"{self._number:06d}.jsonl")
        return {
            "source": self._source,
            "documents": self.documents,
            "drops": dict(sorted(self._drops.items())),
            "lines": self._edits[LINES],
            "replaced": {name: count for name, count in sorted(self._edits.items()) if name != LINES},
            "inputs": self._inputs,
            "first_bad": self._first_bad,
            "tokens": self.tokens,
        }


def write_inputs(results: Iterable[dict[str, Any]], path: Path) -> None:
    """Write the inputs of all units in order, one per line."""
    with path.open("wb") as stream:
        for result in results:
            stream.writelines(orjson.dumps(line) + b"\n" for line in result["inputs"])
        sync(stream)


def totals(results: Iterable[dict[str, Any]], config: BuildConfig) -> dict[str, Any]:
    """The counts of each source for the manifest, from the journals of all units in order.

    Raises ConfigError if there are more bad records or damaged files than allowed, or no document at all.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    drops: dict[str, Counter[str]] = defaultdict(Counter)
    files: dict[str, set[str]] = defaultdict(set)
    replaced: dict[str, Counter[str]] = defaultdict(Counter)
    first_bad = None
    for result in results:
        source = result["source"]
        counts[source].update(documents=result["documents"], bytes=sum(line["bytes"] for line in result["inputs"]))
        files[source].update(line["file"] for line in result["inputs"])
        drops[source].update(result["drops"])
        if result.get("lines"):
            counts[source].update(lines_left_out=result["lines"])
        replaced[source].update(result.get("replaced", {}))
        first_bad = first_bad or result["first_bad"]
    documents = sum(count["documents"] for count in counts.values())
    _check(documents, sum(drops.values(), Counter[str]()), first_bad, config)
    return {
        source: {
            **count,
            **({"replaced": dict(sorted(replaced[source].items()))} if replaced[source] else {}),
            "files": len(files[source]),
            "drops": dict(sorted(drops[source].items())),
        }
        for source, count in counts.items()
    }


def _check(documents: int, drops: Counter[str], first_bad: list[Any] | None, config: BuildConfig) -> None:
    records = documents + drops.total()
    bad = sum(drops[reason] for reason in BAD)
    damaged_files = drops[DAMAGED]  # they have a limit of their own
    if bad - damaged_files > config.max_bad_fraction * records or damaged_files > config.max_damaged_files:
        assert first_bad is not None
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in drops.most_common() if reason in BAD)
        bound = f"max_bad_fraction {config.max_bad_fraction:g}"
        if damaged_files > config.max_damaged_files:
            bound = f"max_damaged_files {config.max_damaged_files}"
        raise ConfigError(
            f"{bad:,} of {records:,} records are bad ({reasons}), more than {bound}; the first is {first_bad[0]} at "
            f"{first_bad[1]:,}: {first_bad[2]}; see {config.out}.partial/work/quarantine; raise the bound to finish "
            f"without reading again, or correct the input and run the same command again"
        )
    if not documents:
        raise ConfigError(
            f"sources: {', '.join(config.sources)}: they hold no document to write; {drops[EMPTY]:,} are empty, "
            f"{drops.total() - drops[EMPTY]:,} were dropped; check field and filters"
        )


def kept(manifest: Manifest) -> dict[str, tuple[int, int]]:
    """The documents and tokens of each source in all splits together. Leaves out adopted token files, which have no
    source.
    """
    found: dict[str, tuple[int, int]] = {}
    for info in (info for infos in manifest.splits.values() for info in infos if info.source):
        documents, tokens = found.get(info.source, (0, 0))
        found[info.source] = (documents + info.documents, tokens + info.tokens)
    return found


def origin(config: BuildConfig, tokenizer: Tokenizer, plan: str) -> dict[str, Any]:
    """Everything that decides the bytes of the shards, as plain values. A build with an equal origin need not run
    again.

    plan: the hash of the units, which includes the names, sizes and times of all files.
    """
    settings = {key: value for key, value in to_dict(config).items() if key not in RUNNING}
    for key, value in BEFORE.items():
        if settings[key] == value:
            del settings[key]
    for source in settings["sources"].values():
        for key, value in BEFORE_OF_SOURCE.items():
            if source[key] == value:
                del source[key]
    # These can change without the tokenizer's hash, through other files in its folder.
    ends = [tokenizer.bos_id, tokenizer.eod_id]
    made: dict[str, Any] = {"config": settings, "tokenizer": tokenizer.sha256, "ends": ends, "plan": plan}
    used = {name for source in config.sources.values() for name in source.filters}
    if config.deduplicate == "minhash" or used & {"gopher_repetition", "c4"}:
        made["cleaning"] = CLEANING
    if read := {name: what for name, source in config.sources.items() if (what := identities(source.filters))}:
        made["filters"] = read
    templates = {name: source.loss.template for name, source in config.sources.items() if source.loss is not None}
    if contents := {name: content_of(Path(path)) for name, path in templates.items() if path is not None}:
        made["templates"] = {name: hash_of_json(content) for name, content in contents.items()}
    return made


def compose(
    folder: Path,
    config: BuildConfig,
    tokenizer: Tokenizer,
    splits: dict[str, list[ShardInfo]],
    files: list[Path],
    provenance: dict[str, Any],
) -> Manifest:
    """The manifest of a build in `folder`. `splits` are its shards, and `files` are its other files."""
    environment = {"python": platform.python_version(), "packages": {name: _version(name) for name in PACKAGES}}
    weights = {name: source.weight for name, source in config.sources.items() if source.weight is not None}
    return Manifest(
        dtype=dtype_for(tokenizer.vocab_size).name,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id if config.append_eod else None,
        bos_id=tokenizer.bos_id,
        tokenizer=tokenizer.sha256,
        splits=splits,
        weights=weights,
        files={path.relative_to(folder).as_posix(): hash_file(path) for path in files},
        provenance={**provenance, **environment},
    )


def _version(package: str) -> str:
    """The version of an installed package. importlib's own also parses the description, at ten times the cost."""
    if package == "ponder-scale":
        return __version__  # the version of the running code, which may differ from the installed one
    found = distribution(package)
    # A package installed in place has an egg-info, whose file has the older name.
    lines = (found.read_text("METADATA") or found.read_text("PKG-INFO") or "").splitlines()
    return next(line.removeprefix("Version: ") for line in lines if line.startswith("Version: "))
