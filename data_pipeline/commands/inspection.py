"""Describe a folder of shards in words: counts, lengths of documents, decoded samples."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.tokenize.tokenizer import Tokenizer, open_tokenizer
from data_pipeline.write.lengths import Lengths
from data_pipeline.write.manifest import kept
from ponder_scale.shards.format import Shard, ShardSet
from ponder_scale.shards.manifest import PACKING_PREFIX, ShardInfo
from ponder_scale.shards.packing import SEAL

HEAD_TOKENS, TAIL_TOKENS = 60, 20  # tokens of a document to show
QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)


def describe(shards: ShardSet, samples: int) -> Iterator[str]:
    """Lines about the folder, and `samples` evenly spaced places in the training split at which a document begins."""
    yield from _counts(shards)
    yield ""
    yield from _samples(shards, samples)


def _counts(shards: ShardSet) -> Iterator[str]:
    manifest = shards.manifest
    yield f"{shards.folder}"
    yield f"identity    {manifest.identity}"
    yield f"tokenizer   {manifest.tokenizer[:16]}, {manifest.vocab_size:,} tokens, in {shards.tokenizer_folder}"
    yield f"tokens      {manifest.dtype}, end of document {manifest.eod_id}"
    seals = sorted(shards.folder.glob(f"{PACKING_PREFIX}*/{SEAL}"))
    packings = [seal.parent.name.removeprefix(PACKING_PREFIX) for seal in seals]
    yield f"packed for  sequences of {', '.join(packings)} tokens" if packings else "packed for  no sequences"
    of_source = kept(manifest)
    for source, counts in manifest.provenance.get("sources", {}).items():
        drops = ", ".join(f"{count:,} {reason}" for reason, count in counts["drops"].items()) or "nothing"
        if "lines_left_out" in counts:
            drops += f"; {counts['lines_left_out']:,} lines of documents (c4: endless word)"
        for what, count in counts.get("replaced", {}).items():
            drops += f"; replaced: {count:,} {what}"
        if "bytes_behind_cap" in counts:
            drops += (
                f"; {counts['bytes_behind_cap']:,} bytes of input behind the cap, {counts['units_behind_cap']:,} units"
            )
        yield f"source      {source}: {counts['files']:,} files, {counts['bytes']:,} bytes; dropped: {drops}"
        documents, tokens = of_source.get(source, (0, 0))
        yield f"{'':<12}{source}: kept {documents:,} documents, {tokens:,} tokens"
    for source, reasons in manifest.provenance.get("left_out", {}).items():
        yield f"left out    of {source}: {', '.join(f'{count:,} {reason}' for reason, count in reasons.items())}"
    if "command" in manifest.provenance:
        yield f"made by     {manifest.provenance['command']}"
    for command in manifest.provenance.get("commands", ()):
        yield f"{'':<12}of what was made by {command}"
    for split in manifest.splits:
        of_split = shards.split(split)
        documents = sum(shard.info.documents for shard in of_split)
        yield f"{split:<12}{documents:,} documents, {manifest.tokens(split):,} tokens, shards: {len(of_split):,}"
        yield from _loss(manifest.splits[split])
        if documents:
            lengths = Lengths()
            for shard in of_split:
                lengths.add(shard.lengths)
            found = zip(QUANTILES, lengths.quantiles(QUANTILES), strict=True)
            spread = ", ".join(f"{q:.0%} {length:,}" for q, length in found)
            yield f"{'':<12}tokens of a document, by quantile: {spread}"
            yield f"{'tokens of a document':>29} {'documents':>15} {'tokens':>7}"
            yield from lengths.bars()


def _loss(infos: list[ShardInfo]) -> Iterator[str]:
    """For each source with a mask, a line with the number of tokens that count in the loss."""
    for source in sorted({info.source for info in infos if info.mask_hash is not None}):
        own = [info for info in infos if info.source == source]
        counted, tokens = sum(info.tokens_that_count for info in own), sum(info.tokens for info in own)
        of = f"of {source} " if source else ""
        yield f"{'':<12}{of}{counted:,} tokens count in the loss, {counted / max(1, tokens):.1%}"


def _samples(shards: ShardSet, count: int) -> Iterator[str]:
    of_split = [shard for shard in shards.split("train") if shard.info.documents]
    if not of_split or not count:
        return
    made = shards.manifest.provenance
    asked = made["adopted"] if "adopted" in made else made.get("origin", {}).get("config", {})
    tokenizer = open_tokenizer(shards.tokenizer_folder, asked.get("eod_token"))
    for number in range(count):
        shard = of_split[number * len(of_split) // count]
        yield from _boundary(shard, shard.info.documents * number // count, tokenizer)


def _boundary(shard: Shard, document: int, tokenizer: Tokenizer) -> Iterator[str]:
    """The end of the previous document, if there is one, and the beginning of this one."""
    begin = int(shard.offsets[document]) // shard.tokens.itemsize
    length = int(shard.lengths[document])

    def text(first: int, end: int) -> str:
        return repr(tokenizer.decode(shard.tokens[first:end].tolist()))

    yield f"--- {shard.info.name}, token {begin:,}"
    if document:
        before = int(shard.lengths[document - 1])
        shown = min(before, TAIL_TOKENS)
        more = f"{before - shown:,} tokens ... " if before > shown else ""
        yield f"{more}{text(begin - shown, begin)}"
    yield f"|== document {document:,} of {shard.info.documents:,}: {length:,} tokens"
    if length <= HEAD_TOKENS + TAIL_TOKENS:
        yield text(begin, begin + length)
    else:
        end = begin + length
        left_out = length - HEAD_TOKENS - TAIL_TOKENS
        yield f"{text(begin, begin + HEAD_TOKENS)} ... {left_out:,} tokens ... {text(end - TAIL_TOKENS, end)}"
    yield "==|"
