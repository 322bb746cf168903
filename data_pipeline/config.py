"""All settings of a build. `ponder_scale.settings.load` fills them from a YAML recipe and `key=value` overrides."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ponder_scale.errors import ConfigError
from ponder_scale.settings import MISSING, knob

RECIPES = Path(str(resources.files("data_pipeline"))) / "recipes"
WITH_FIELDS = ("jsonl", "parquet", "dataset")  # kinds whose records have fields
SourceKind = Literal["jsonl", "parquet", "text", "folder", "dataset"]


@dataclass(frozen=True)
class LossConfig:
    """Which characters of a document count in the loss, given in one of three ways by fields of its record."""

    prompt: str | None = knob(
        None, "Field of a text that does not count in the loss. The document is this text followed by `completion`."
    )
    completion: str | None = knob(
        None, "Field of the text after the prompt. It counts in the loss, and so does the end token."
    )
    spans: str | None = knob(
        None,
        "Field with [[start, end], ...]: the characters of the text that count, from 0. The character at `end` does "
        "not count.",
    )
    messages: str | None = knob(
        None, "Field of a conversation, [{role: ..., content: ...}, ...]. What the assistant says counts."
    )
    template: str | None = knob(
        None,
        "For `messages`: a chat template with {% generation %} around what the assistant says, or the "
        "folder of a tokenizer that has one.",
        path=True,
    )


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from. Names that end in .gz, .zst, .bz2 or .xz are decompressed."""

    kind: SourceKind = knob(
        MISSING,
        "jsonl: one object a line. parquet: one row a document. text: UTF-8 text files. folder: one "
        "document for each file of a tree. dataset: rows of a Hugging Face data set.",
    )
    path: str | list[str] = knob(
        MISSING,
        "For jsonl, parquet and text, a file or a glob such as data/**/*.jsonl.gz. For folder, the "
        "folder. For dataset, its name on the hub or a folder written by save_to_disk. All but dataset "
        "accept URLs such as s3://bucket/*.jsonl. A list is read in its order.",
        path=True,
    )
    field: str = knob(
        "text", "Key or column of the text, for jsonl, parquet and dataset. Write data.text for `text` inside `data`."
    )
    repair: bool = knob(
        False, "jsonl: accept lines with NaN or infinite numbers, and replace lone surrogates with U+FFFD."
    )
    document: Literal["file", "paragraph"] = knob(
        "file", "text: what counts as one document. Blank lines separate paragraphs."
    )
    pattern: str = knob(
        "**/*", "folder: glob of the files to read. It matches hidden files only where it names the dot."
    )
    exclude: list[str] = knob([], "folder: globs of file and folder names to leave out.")
    name: str | None = knob(None, "dataset: its configuration, such as wikitext-103-raw-v1.")
    split: str = knob("train", "dataset: the split to read.")
    revision: str | None = knob(None, "dataset: commit or tag on the hub. `null` uses the newest.")
    streaming: bool = knob(False, "dataset: read from the hub without storing it on disk.")
    filters: dict[str, Any] = knob({}, "Filters by name, with their thresholds: {gopher_quality: {min_words: 50}}.")
    sample: float | None = knob(
        None, "Take this share of the documents, chosen by a hash of their text. `null` takes all.", above=0, max=1
    )
    max_documents: int | None = knob(
        None, "Keep only the first documents, up to this many. `null` keeps all.", min=1, max=2**50
    )
    max_tokens: int | None = knob(
        None,
        "Keep only the first documents, up to this many training and held-out tokens together. `null` keeps all.",
        unit="tokens",
        min=1,
        max=2**50,
    )
    loss: LossConfig | None = knob(
        None, "What counts in the loss, for jsonl, parquet and dataset. `null` counts every token."
    )
    weight: float | None = knob(
        None,
        "Share in training, relative to the other sources. If all sources have `null`, their sizes are the weights.",
        above=0,
        max=1e15,
    )

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(dict.fromkeys(self.path))

    @property
    def url_field(self) -> str | None:
        """The key or column that holds a document's URL; None if no filter needs it."""
        if "url" not in self.filters:
            return None
        thresholds = self.filters["url"]
        field = thresholds.get("field", "url") if isinstance(thresholds, dict) else "url"
        return field if isinstance(field, str) else None


@dataclass(frozen=True)
class BuildConfig:
    """A build of token shards."""

    out: str = knob(MISSING, "Folder of shards to make.", path=True)
    tokenizer: str = knob(
        MISSING, "A folder with tokenizer.json, that file itself, or a SentencePiece .model file.", path=True
    )
    sources: dict[str, SourceConfig] = knob({}, "The inputs by name. They are read in this order.")
    backend: Literal["auto", "reference", "tiktoken", "gigatoken"] = knob(
        "auto",
        "Tokenizer engine. reference: the tokenizer's own library. Every other engine must give the same tokens. auto: "
        "the fastest engine that is installed.",
    )
    eod_token: str | None = knob(None, "End-of-document token. `null` uses the end-of-text token of the tokenizer.")
    append_eod: bool = knob(True, "End each document with the end-of-document token.")
    bos_token: str | None = knob(None, "Begin each document with this token. `null` adds none.")
    special_tokens_in_text: Literal["text", "tokens"] = knob(
        "text",
        "How to encode </s> and other special tokens that stand in a document. text: as ordinary text. tokens: as the "
        "special token.",
    )
    keep_dropped: bool = knob(
        False, "Write each text that filters and deduplication drop to dropped.jsonl, with the reason."
    )
    deduplicate: Literal["none", "exact", "minhash"] = knob(
        "none", "Keep only the first of equal (exact) or nearly equal (minhash) documents of all sources."
    )
    shuffle: bool = knob(
        False,
        "Put documents in a random order over all shards of their source. This needs twice the tokens' size on disk.",
    )
    heldout_fraction: float = knob(
        0.005,
        "Share of the documents to hold out. A hash of the text chooses them, so the choice stays the "
        "same as data grows.",
        min=0,
        max=0.5,
    )
    split_by: Literal["stripped", "text"] = knob(
        "stripped",
        "The text whose hash decides whether a document is held out. stripped: without the white space around it, so "
        "that copies which differ only there are all held out, or none is. text: with that white space, as in builds "
        "made before this key existed.",
    )
    seed: int = knob(0, "Seed of the held-out choice and of the shuffle.", min=0, max=2**31 - 1)
    shard_bytes: int | None = knob(
        None,
        "Bytes of input for one shard. `null` uses 1/32 of the input, between 16 MiB and 1 GiB.",
        unit="bytes",
        min=1,
        max=2**50,
    )
    shard_tokens: int = knob(
        2**30, "Close a shard when it holds this many tokens and begin another.", unit="tokens", min=1, max=2**40
    )
    max_document_bytes: int = knob(
        2**20,
        "Quarantine longer documents. The library tokenizers needs 110 to 260 bytes of memory for each byte.",
        unit="bytes",
        min=1,
        max=2**31 - 1,
    )
    max_bad_fraction: float = knob(0.001, "Fail the build when more than this share of records is bad.", min=0, max=1)
    max_damaged_files: int = knob(
        0,
        "Fail the build when more compressed files than this are cut off, damaged, empty or followed by other bytes.",
        min=0,
        max=10**9,
    )
    workers: int | None = knob(
        None, "Processes of each rank. `null` starts one for each core, or a single one under MPI.", min=1, max=4096
    )
    lease_seconds: float = knob(
        60.0,
        "Give a unit of work to another worker after this long without a sign of life.",
        unit="seconds",
        min=1,
        max=10**7,
    )
    overwrite: bool = knob(
        False, "Build again: replace the finished folder at `out`, and forget an unfinished build of other inputs."
    )

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources is empty; name an input: sources.NAME.kind=jsonl sources.NAME.path=FILE")
        for key, path in (("out", self.out), ("tokenizer", self.tokenizer)):
            if "://" in path:
                raise ConfigError(
                    f"{key} is {path}, a URL; expected a path on this machine, because only sources can be URLs"
                )
        for name, source in self.sources.items():
            if not source.paths:
                raise ConfigError(f"sources.{name}.path is an empty list; name a file, such as [a.jsonl, b.jsonl]")
            if source.url_field is not None and source.kind not in WITH_FIELDS:
                raise ConfigError(
                    f"sources.{name}.filters.url: files of kind={source.kind} have no URL for a document; remove this "
                    f"filter, or give records with a URL"
                )
            _check_loss(name, source, self.special_tokens_in_text)
        weighted = {name: source.weight is not None for name, source in self.sources.items()}
        if len(set(weighted.values())) > 1:
            none = ", ".join(f"sources.{name}.weight" for name, given in weighted.items() if not given)
            raise ConfigError(f"{none} is null, while other sources have a weight; give all of them one, or none")


def _check_loss(name: str, source: SourceConfig, special_tokens_in_text: str) -> None:
    """Raise ConfigError for a loss from which it cannot be known which tokens count."""
    loss = source.loss
    if loss is None:
        return
    given = {key: value for key, value in vars(loss).items() if value is not None}
    if set(given) not in ({"prompt", "completion"}, {"spans"}, {"messages", "template"}) or (
        loss.prompt is not None and loss.prompt == loss.completion
    ):
        raise ConfigError(
            f"sources.{name}.loss is {given}; expected {{prompt: FIELD, completion: FIELD}}, {{spans: FIELD}} or "
            f"{{messages: FIELD, template: PATH}}"
        )
    if source.kind not in WITH_FIELDS:
        raise ConfigError(
            f"sources.{name}.loss: kind {source.kind} has no fields that could say what counts; expected one of: "
            f"{', '.join(WITH_FIELDS)}"
        )
    if loss.messages is not None and special_tokens_in_text != "tokens":
        raise ConfigError(
            f"special_tokens_in_text is {special_tokens_in_text}: the special tokens of sources.{name}.loss.template "
            f"would be ordinary text; set special_tokens_in_text=tokens"
        )


# Settings that may change when you continue a build. They affect how it runs, not its result.
RUNNING = ("out", "overwrite", "workers", "lease_seconds", "max_bad_fraction", "max_damaged_files")
