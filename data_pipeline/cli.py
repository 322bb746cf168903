"""The command `ponder-data`, which turns corpora into token shards. Each command loads only what it needs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.build.parallel import one_thread
from data_pipeline.commands.learn import MAX_BAD_FRACTION, build_to_learn_from
from data_pipeline.config import RECIPES, BuildConfig, SourceConfig
from data_pipeline.progress import Progress
from ponder_scale.errors import ConfigError, ShardError, UserError
from ponder_scale.settings import MISSING, find_recipe, load
from ponder_scale.settings.commandline import Parser, flags, new_folder, number, outlive_readers, parse, path, whole
from ponder_scale.shards.manifest import read_manifest, verify
from ponder_scale.version import __version__

KINDS = ("megatron", "datatrove", "raw")  # kinds of token files that you can adopt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    The code is 0 for success, 2 for an error that you can fix, 130 for Ctrl-C, 143 for SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    outlive_readers()
    try:
        options = parse(_parser(), arguments, BuildConfig, "settings")
        with _ended_in_order():
            options.run(options, shlex.join(["ponder-data", *arguments]))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except _Terminated:
        print("error: ended by SIGTERM; finished work is kept, and the same command continues it", file=sys.stderr)
        return 143
    return 0


class _Terminated(BaseException):
    """Raised when SIGTERM arrives."""


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Turn SIGTERM into an exception inside the block, so that workers end and claims are given up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ignore further signals
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> Parser:
    parser = Parser(prog="ponder-data", description="Make memory-mapped token shards from corpora.")
    parser.add_argument("--version", action="version", version=f"ponder-data {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("build", help="make a folder of token shards")
    command.add_argument("settings", nargs="*", metavar="[RECIPE] key=value", help="a recipe, then overrides")
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, "\n".join(_keys())
    command.set_defaults(run=_build)

    command = commands.add_parser("inspect", help="summarize a folder of shards and print samples")
    command.add_argument("folder", type=path, help="folder of shards")
    command.add_argument("--samples", type=whole(0), default=2, help="documents to print, evenly spaced (default: 2)")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("verify", help="read every byte of a folder of shards and check its hash")
    command.add_argument("folder", type=path, help="folder of shards")
    command.set_defaults(run=_verify)

    command = commands.add_parser("pack", help="pack documents into sequences, for data.packing=best-fit")
    command.add_argument("folder", type=path, help="folder of shards")
    command.add_argument(
        "--seq-len", type=whole(2), required=True, help="sequence length (data.seq_len) of the runs that will read it"
    )
    command.set_defaults(run=_pack)

    _add_plan(commands)
    _add_adopt(commands)
    _add_grow(commands)
    _add_train_tokenizer(commands)
    return parser


def _add_plan(commands: Any) -> None:
    command = commands.add_parser("plan", help="estimate tokens, time and disk of a build from a sample")
    command.add_argument("settings", nargs="*", metavar="[RECIPE] key=value", help="the settings of the build")
    command.add_argument(
        "--sample-mb", type=number(above=0, most=1e9), default=8.0, help="MB of input to read and tokenize (default: 8)"
    )
    command.add_argument(
        "--tokens",
        type=number(above=0, most=1e16),
        help="also print how often a run of this many tokens reads each source",
    )
    command.set_defaults(run=_plan)


def _add_adopt(commands: Any) -> None:
    command = commands.add_parser("adopt", help="use token files that other programs made, without copying them")
    command.add_argument("files", nargs="+", type=path, metavar="FILE", help="token files in reading order")
    command.add_argument("--kind", choices=KINDS, required=True, help="format of the files")
    command.add_argument(
        "--tokenizer",
        dest="tokenizer_path",
        metavar="PATH",
        type=path,
        required=True,
        help="the tokenizer that made the tokens",
    )
    command.add_argument(
        "--out", type=new_folder, required=True, help="folder to create for links to the files, an index and a manifest"
    )
    command.add_argument("--dtype", choices=["uint16", "uint32"], help="type of the tokens in raw files")
    command.add_argument(
        "--heldout-files", type=whole(0), default=0, help="hold out this many of the last files (default: 0)"
    )
    command.add_argument("--eod-token", help="token that ends each document (default: the tokenizer's own)")
    command.set_defaults(run=_adopt)


def _add_grow(commands: Any) -> None:
    command = commands.add_parser(
        "append", help="add new files to a folder of shards without reading the old ones again"
    )
    command.add_argument("folder", type=path, help="folder that `ponder-data build` made")
    command.add_argument(
        "settings", nargs="*", metavar="key=value", help="the sources of the new files, written as for build"
    )
    command.set_defaults(run=_append)

    command = commands.add_parser("merge", help="join several folders of shards into one without reading text again")
    command.add_argument("out", type=new_folder, help="folder to create")
    command.add_argument(
        "folders", type=path, nargs="+", metavar="FOLDER", help="folders in reading order; they are not changed"
    )
    command.add_argument(
        "--allow-duplicates", action="store_true", help="merge even if the folders share files or documents"
    )
    command.add_argument(
        "--without-last",
        type=whole(1),
        metavar="N",
        help="give one FOLDER, and get it as it was before its last N appends",
    )
    command.set_defaults(run=_merge)


def _add_train_tokenizer(commands: Any) -> None:
    command = commands.add_parser("train-tokenizer", help="train a tokenizer on texts")
    command.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="text, .jsonl or .parquet files, or folders of text files; or the recipe of a build and key=value",
    )
    command.add_argument("--recipe", help="read the sources of this build, with their fields, filters and weights")
    command.add_argument("--vocab-size", type=whole(1), required=True, help="number of tokens")
    command.add_argument(
        "--kind", choices=["bpe", "sentencepiece"], default="bpe", help="kind of tokenizer (default: bpe)"
    )
    command.add_argument("--out", type=new_folder, required=True, help="folder to create")
    command.add_argument("--field", help="key or column of the text in .jsonl and .parquet files (default: text)")
    command.add_argument("--pattern", help="glob of the files to read in a folder (default: **/*)")
    command.add_argument(
        "--exclude", action="append", default=[], help="file or folder name to leave out; repeat for more"
    )
    command.add_argument(
        "--max-bad-fraction",
        type=float,
        help=f"fail when a larger share of the records is bad (default: {MAX_BAD_FRACTION:g}, or the recipe's)",
    )
    command.set_defaults(run=_train_tokenizer)


def _keys() -> Iterator[str]:
    """The keys of a build, for its help text."""
    yield "keys, with their defaults:"
    for schema, prefix in ((BuildConfig, ""), (SourceConfig, "sources.NAME.")):
        for item in dataclasses.fields(schema):
            made = item.default_factory
            default = item.default if made is dataclasses.MISSING else made()
            shown = "required" if default == MISSING else json.dumps(default)
            line = f"{prefix}{item.name} ({shown}): {item.metadata['help']}"
            yield from textwrap.wrap(line, 100, initial_indent="  ", subsequent_indent="      ")


def _config(settings: list[str]) -> BuildConfig:
    recipe = find_recipe(settings[0], RECIPES) if settings and "=" not in settings[0] else None
    return load(BuildConfig, recipe, settings[1:] if recipe else settings)


def _build(options: argparse.Namespace, command: str) -> None:
    one_thread()
    # late, because it loads numpy, whose threads cost a small build a fifth of its time
    from data_pipeline.build.pipeline import build
    from data_pipeline.write.manifest import kept

    config = _config(options.settings)
    built = build(config, command)
    if built is None:
        return
    for split, shards in built.manifest.splits.items():
        documents, tokens = sum(shard.documents for shard in shards), built.manifest.tokens(split)
        print(f"{split}: {documents:,} documents, {tokens:,} tokens, shards: {len(shards)}")
    for source, (documents, tokens) in kept(built.manifest).items():
        print(f"kept of {source}: {documents:,} documents, {tokens:,} tokens")
    for source, counts in built.manifest.provenance["sources"].items():
        for reason, count in counts["drops"].items():
            print(f"dropped from {source}: {count:,} {reason}")
        if "lines_left_out" in counts:
            print(f"left out of documents of {source}: {counts['lines_left_out']:,} lines with an endless word (c4)")
        for what, count in counts.get("replaced", {}).items():
            print(f"replaced in documents of {source}: {count:,} {what} (pii)")
        if "bytes_behind_cap" in counts:
            size, units = counts["bytes_behind_cap"], counts["units_behind_cap"]
            print(f"left out of {source}: {size:,} bytes of input behind the cap, {units:,} units")
    print(f"built {config.out}" if built.new else f"{config.out} was built from these inputs and settings already")


def _plan(options: argparse.Namespace, command: str) -> None:
    one_thread()
    from data_pipeline.commands.estimate import estimate

    print(estimate(_config(options.settings), int(options.sample_mb * 1e6), options.tokens))


def _adopt(options: argparse.Namespace, command: str) -> None:
    from data_pipeline.commands.adopt import adopt

    manifest = adopt(**flags(options), command=command)
    tokens = sum(map(manifest.tokens, manifest.splits))
    documents = sum(info.documents for infos in manifest.splits.values() for info in infos)
    print(
        f"adopted {len(options.files)} files, {documents:,} documents, {tokens:,} tokens, as {options.out}; the files "
        f"must stay where they are"
    )


def _append(options: argparse.Namespace, command: str) -> None:
    one_thread()
    from data_pipeline.commands.grow import append
    from data_pipeline.write.manifest import kept

    manifest = append(**flags(options), command=command)
    if manifest is not None:
        _say_kept(kept(manifest), options.folder)


def _merge(options: argparse.Namespace, command: str) -> None:
    from data_pipeline.commands.grow import before_appends, merge
    from data_pipeline.write.manifest import kept

    if options.without_last is None:
        manifest = merge(options.out, options.folders, command, allow_duplicates=options.allow_duplicates)
    elif len(options.folders) == 1:
        manifest = before_appends(options.out, options.folders[0], options.without_last, command)
    else:
        raise ConfigError(f"--without-last takes one folder of shards, but {len(options.folders)} are given; give one")
    _say_kept(kept(manifest), options.out)


def _say_kept(counts: dict[str, tuple[int, int]], folder: Path) -> None:
    for source, (documents, tokens) in counts.items():
        print(f"{source}: {documents:,} documents, {tokens:,} tokens")
    print(f"{folder} holds all of them; pack it again if runs read it with data.packing=best-fit")


def _inspect(options: argparse.Namespace, command: str) -> None:
    from data_pipeline.commands.inspection import describe
    from ponder_scale.shards.format import open_shards

    for line in describe(open_shards(options.folder), options.samples):
        print(line)


def _pack(options: argparse.Namespace, command: str) -> None:
    from ponder_scale.shards.format import open_shards
    from ponder_scale.shards.packing import pack

    shards = open_shards(options.folder)
    infos = [info for infos in shards.manifest.splits.values() for info in infos]
    with Progress("pack", sum(info.bytes for info in infos)) as progress:
        content = pack(shards, options.seq_len, progress.add)
    packed = content["shards"].values()
    bins, tokens, cut = (sum(info[key] for info in packed) for key in ("bins", "tokens", "cut_by_concat"))
    documents = sum(info.documents for info in infos)
    print(
        f"packed {documents:,} documents into {bins:,} sequences of {options.seq_len:,} tokens, "
        f"{tokens / max(1, bins * (options.seq_len + 1)):.2%} full; concat would cut {cut / max(1, documents):.1%} of "
        f"them that fit into one"
    )


def _verify(options: argparse.Namespace, command: str) -> None:
    from ponder_scale.shards.packing import verify_packings

    manifest = read_manifest(options.folder)
    size = sum(shard.bytes for shards in manifest.splits.values() for shard in shards)
    with Progress("verify", size) as progress:
        findings = [*verify(options.folder, progress.add), *verify_packings(options.folder)]
    for finding in findings:
        print(finding)
    if findings:
        raise ShardError(f"{options.folder}: {len(findings)} findings; restore what is damaged, or build again")
    print(f"{options.folder}: every byte is as it was built")


def _train_tokenizer(options: argparse.Namespace, command: str) -> None:
    from data_pipeline.tokenize.texts import Read, texts_to_learn
    from data_pipeline.tokenize.training import train_tokenizer

    chosen = ("recipe", "out", "field", "pattern", "exclude", "max_bad_fraction")
    config = build_to_learn_from(options.inputs, **{name: getattr(options, name) for name in chosen})
    counts: dict[str, Read] = {}
    size = train_tokenizer(texts_to_learn(config, counts), options.vocab_size, options.kind, options.out)
    for source, read in counts.items():
        print(f"learned from {source}: {read.documents:,} documents, {read.bytes:,} bytes of text")
        for reason, count in sorted(read.drops.items()):
            print(f"dropped from {source}: {count:,} {reason}")
    if size < options.vocab_size:
        print(f"the texts support no more than {size:,} tokens, of {options.vocab_size:,} asked for")
    print(f"trained {options.out}: {size:,} tokens")


if __name__ == "__main__":
    sys.exit(main())
