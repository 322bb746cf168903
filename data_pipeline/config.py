"""Every knob of a build, filled from a YAML recipe and `key=value` overrides by `ponder_scale.settings.load`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ponder_scale.errors import ConfigError
from ponder_scale.settings import MISSING, knob

WITH_FIELDS = ("jsonl", "parquet", "dataset")  # kinds whose records have fields
SourceKind = Literal["jsonl", "parquet", "text", "folder", "dataset"]


@dataclass(frozen=True)
class LossConfig:
    """Which characters of a document count in the loss, by fields of its record; one of the three ways."""

    prompt: str | None = knob(None, "the field of a text that does not count; the document is this and `completion`")
    completion: str | None = knob(None, "the field of the text behind it, which counts, and so does the end token")
    spans: str | None = knob(
        None, "the field with [[start, end], ...]: the characters of the text that count, from 0, without the end"
    )
    messages: str | None = knob(
        None, "the field of a conversation, [{role: ..., content: ...}, ...]; what the assistant says counts"
    )
    template: str | None = knob(
        None,
        "of `messages`: the chat template with {% generation %} around what the assistant says, or the folder of a "
        "tokenizer that has one",
        path=True,
    )


@dataclass(frozen=True)
class SourceConfig:
    """Where documents come from. Names that end in .gz, .zst, .bz2 or .xz are decompressed."""

    kind: SourceKind = knob(
        MISSING,
        "jsonl: an object on each line; parquet: a row each; text: UTF-8 text files; folder: a document per file of "
        "a tree; dataset: rows of a Hugging Face data set",
    )
    path: str | list[str] = knob(
        MISSING,
        "jsonl, parquet, text: a file or a glob such as data/**/*.jsonl.gz; folder: the folder; dataset: its name on "
        "the hub, or a folder written by save_to_disk; all but the last may be URLs, s3://bucket/*.jsonl; a list of "
        "these is read in its order",
        path=True,
    )
    field: str = knob("text", "jsonl, parquet, dataset: the key or column of the text; data.text is text in data")
    repair: bool = knob(False, "jsonl: read lines with NaN or infinite numbers, and replace lone surrogates by U+FFFD")
    document: Literal["file", "paragraph"] = knob("file", "text: what one document is; blank lines end paragraphs")
    pattern: str = knob("**/*", "folder: glob of the files to read; it names hidden ones only with the dot")
    exclude: list[str] = knob([], "folder: names of files and folders to leave out; globs")
    name: str | None = knob(None, "dataset: its configuration, such as wikitext-103-raw-v1")
    split: str = knob("train", "dataset: the split to read")
    revision: str | None = knob(None, "dataset: commit or tag on the hub; null: the newest")
    streaming: bool = knob(False, "dataset: read from the hub without storing it on disk")
    filters: dict[str, Any] = knob({}, "by name, with their thresholds: {gopher_quality: {min_words: 50}}")
    sample: float | None = knob(
        None, "share of its documents that is taken, chosen by the hash of their text; null: all", above=0, max=1
    )
    max_documents: int | None = knob(
        None, "its first documents that are kept; those behind them are left out; null: all", min=1, max=2**50
    )
    max_tokens: int | None = knob(
        None,
        "the same by tokens of both splits together: the documents before the first that would exceed them",
        unit="tokens",
        min=1,
        max=2**50,
    )
    loss: LossConfig | None = knob(
        None, "jsonl, parquet, dataset: what of a document counts in the loss; null: every token"
    )
    weight: float | None = knob(
        None, "share in training relative to the other sources; null, for all sources: by size", above=0, max=1e15
    )

    @property
    def paths(self) -> list[str]:
        """Each path once, in the order given."""
        return [self.path] if isinstance(self.path, str) else list(dict.fromkeys(self.path))

    @property
    def url_field(self) -> str | None:
        """The key or column of the URL of a document; None where no filter asks for it."""
        if "url" not in self.filters:
            return None
        thresholds = self.filters["url"]
        field = thresholds.get("field", "url") if isinstance(thresholds, dict) else "url"
        return field if isinstance(field, str) else None


@dataclass(frozen=True)
class BuildConfig:
    """A build of token shards."""

    out: str = knob(MISSING, "the folder of shards to make", path=True)
    tokenizer: str = knob(MISSING, "a folder with tokenizer.json, that file, or a SentencePiece .model file", path=True)
    sources: dict[str, SourceConfig] = knob({}, "the inputs, by name, read in this order")
    backend: Literal["auto", "reference", "tiktoken", "gigatoken"] = knob(
        "auto", "the engine; others than the tokenizer's own library must give its tokens; auto: the fastest installed"
    )
    eod_token: str | None = knob(None, "null: the tokenizer's own end-of-text token")
    append_eod: bool = knob(True, "end each document with the end-of-document token")
    bos_token: str | None = knob(None, "begin each document with this token; null: with none")
    special_tokens_in_text: Literal["text", "tokens"] = knob(
        "text", "what </s> and the like inside a document become: ordinary text, or the special token"
    )
    keep_dropped: bool = knob(
        False, "write what filters and deduplicate drop to dropped.jsonl, each text with its reason"
    )
    deduplicate: Literal["none", "exact", "minhash"] = knob(
        "none", "keep the first of equal, or of nearly equal, documents of all sources"
    )
    shuffle: bool = knob(
        False, "documents in a random order over all shards; needs the size of the tokens twice on disk"
    )
    heldout_fraction: float = knob(
        0.005, "of the documents, chosen by the hash of their text: stable as data grows", min=0, max=0.5
    )
    split_by: Literal["stripped", "text"] = knob(
        "stripped",
        "that text, without the white space around it, so that copies that differ in it are on one side; text: with "
        "it, as all builds did before there was this key",
    )
    seed: int = knob(0, "of that choice and of the shuffle", min=0, max=2**31 - 1)
    shard_bytes: int | None = knob(
        None, "input of one shard; null: 1/32 of all, between 16 MiB and 1 GiB", unit="bytes", min=1, max=2**50
    )
    shard_tokens: int = knob(
        2**30, "a shard that holds as many is closed, and another begun", unit="tokens", min=1, max=2**40
    )
    max_document_bytes: int = knob(
        2**20,
        "longer ones are quarantined; tokenizers takes 110 to 260 bytes of memory for each",
        unit="bytes",
        min=1,
        max=2**31 - 1,
    )
    max_bad_fraction: float = knob(0.001, "of the records; more bad ones fail the build", min=0, max=1)
    max_damaged_files: int = knob(
        0,
        "compressed files that are cut off, damaged, empty or followed by something else; more fail the build",
        min=0,
        max=10**9,
    )
    workers: int | None = knob(None, "processes of each rank; null: one for each core, under MPI one", min=1, max=4096)
    lease_seconds: float = knob(
        60.0, "silence after which a worker's unit is given to another", unit="seconds", min=1, max=10**7
    )
    overwrite: bool = knob(False, "build again: replace the finished folder at out, forget an unfinished other build")

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources is empty; name an input: sources.NAME.kind=jsonl sources.NAME.path=FILE")
        for key, path in (("out", self.out), ("tokenizer", self.tokenizer)):
            if "://" in path:
                raise ConfigError(
                    f"{key} is {path}, a URL; expected a path of this machine; only sources are read by URL"
                )
        for name, source in self.sources.items():
            if not source.paths:
                raise ConfigError(f"sources.{name}.path is an empty list; name a file, such as [a.jsonl, b.jsonl]")
            if source.url_field is not None and source.kind not in WITH_FIELDS:
                raise ConfigError(
                    f"sources.{name}.filters.url: files of kind={source.kind} say no URL of a document; remove it, or "
                    f"give records with one"
                )
            _check_loss(name, source, self.special_tokens_in_text)
        weighted = {name: source.weight is not None for name, source in self.sources.items()}
        if len(set(weighted.values())) > 1:
            none = ", ".join(f"sources.{name}.weight" for name, given in weighted.items() if not given)
            raise ConfigError(f"{none} is null, while other sources have a weight; give all of them one, or none")


def _check_loss(name: str, source: SourceConfig, special_tokens_in_text: str) -> None:
    """Raises ConfigError for a loss that does not say, or cannot know, what counts."""
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


# What may differ between a build and its continuation: how it runs, not what it makes.
RUNNING = ("out", "overwrite", "workers", "lease_seconds", "max_bad_fraction", "max_damaged_files")
