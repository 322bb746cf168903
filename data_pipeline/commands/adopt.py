"""Turn token files of other programs into a folder of shards. Their data is read, and never copied or changed.

Megatron-LM, NeMo and GPT-NeoX (.bin/.idx) only need a manifest. datatrove (.ds, .ds.index) and headerless dumps (uint16
or uint32, as nanoGPT, dolma and others write) get an index in Megatron's format, and a .bin that is a symbolic link.
The formats do not name the tokenizer, and some do not give the type of the tokens. You give these, and `dumps` checks
them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from data_pipeline.commands.dumps import Dump, Kind, open_dump, pieces
from data_pipeline.tokenize.tokenizer import Tokenizer, open_tokenizer, save
from ponder_scale.errors import ShardError
from ponder_scale.files.write import hash_file, writing
from ponder_scale.shards.format import TOKENIZER, index_pieces
from ponder_scale.shards.manifest import BlockHashes, Manifest, ShardInfo, seal, unsealed
from ponder_scale.shards.mask import count_bits, is_mask


def adopt(
    files: list[Path],
    kind: Kind,
    tokenizer_path: Path,
    out: Path,
    dtype: str | None,
    heldout_files: int,
    eod_token: str | None,
    command: str,
) -> Manifest:
    """Create the folder of shards `out` from these files. The last `heldout_files` of them are held out.

    dtype: type of headerless tokens, uint16 or uint32; None for formats that contain it. eod_token: None for the
    tokenizer's.
    Raises ShardError if a file is not of the given kind, or holds token ids that the tokenizer does not have.
    """
    if out.exists() and any(out.iterdir()):
        raise ShardError(f"--out is {out}, which is not empty; choose another folder")
    if not 0 <= heldout_files < len(files):
        raise ShardError(f"--heldout-files is {heldout_files}, of {len(files)} files; expected 0 to {len(files) - 1}")
    tokenizer = open_tokenizer(tokenizer_path, eod_token)
    dumps = [open_dump(path, kind, dtype, tokenizer) for path in files]
    if len({dump.dtype for dump in dumps}) > 1:
        raise ShardError(
            f"the files hold tokens of different types: {', '.join(f'{d.path} {d.dtype.name}' for d in dumps)}; "
            f"adopt each type on its own"
        )
    for dump in dumps:
        _check_mask(dump)
    out.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[ShardInfo]] = {"train": [], "heldout": []}
    for number, dump in enumerate(dumps):
        split = "heldout" if number >= len(dumps) - heldout_files else "train"
        splits[split].append(_place(dump, out, f"{split}-{len(splits[split]):05d}", tokenizer))
    copies = save(tokenizer, out / TOKENIZER)
    marked = {dump.marked for dump in dumps}
    for dump in dumps:
        if kind == "raw" and not dump.marked and len(dump.lengths) == 1:
            print(
                f"warning: {dump.path}: it contains no end token ({tokenizer.eod_id}), so it becomes one "
                f"document; give the end token that it was made with as --eod-token",
                file=sys.stderr,
            )
    about = {"kind": kind, "files": [str(path.resolve()) for path in files], "eod_token": eod_token}
    manifest = Manifest(
        dtype=dumps[0].dtype.name.replace("uint32", "int32"),
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id if marked == {"end"} else None,
        bos_id=tokenizer.eod_id if marked == {"begin"} else None,
        tokenizer=tokenizer.sha256,
        splits=splits,
        files={path.relative_to(out).as_posix(): hash_file(path) for path in copies},
        provenance={"command": command, "adopted": about},
    )
    seal(out, manifest)
    return manifest


def _check_mask(dump: Dump) -> None:
    """Raise ShardError if a `.mask` file beside a dump is not a mask of its tokens."""
    path, tokens = dump.path.with_suffix(".mask"), int(dump.lengths.sum())
    if path.exists() and not is_mask(path, tokens):
        raise ShardError(
            f"{path}: lies beside {dump.path.name}, but is not a mask with one bit for each of its {tokens:,} tokens; "
            f"move it away if every token should count in the loss"
        )


def _place(dump: Dump, out: Path, name: str, tokenizer: Tokenizer) -> ShardInfo:
    """Create the links and an index in `out`. Returns the description of the shard."""
    target, index = out / f"{name}.bin", out / f"{name}.idx"
    target.symlink_to(dump.path.resolve())
    if dump.indexed:
        index.symlink_to(dump.path.with_suffix(".idx").resolve())
        index_hash = hash_file(index)
    else:
        whole = xxhash.xxh3_128()
        with writing(index, temporary=unsealed(index)) as stream:
            for piece in index_pieces(dump.lengths, dump.dtype):
                stream.write(piece)
                whole.update(piece)
        index_hash = whole.hexdigest()
    hashes = BlockHashes()
    for _, tokens in pieces(dump):
        hashes.update(np.ascontiguousarray(tokens).view(np.uint8).data)
    size = int(dump.lengths.sum())
    info = ShardInfo(name, len(dump.lengths), size, size * dump.dtype.itemsize, hashes.finish(), index_hash)
    mask = dump.path.with_suffix(".mask")
    if not mask.exists():
        return info
    link = out / f"{name}.mask"
    link.symlink_to(mask.resolve())
    return replace(info, mask_hash=hash_file(link), counted=count_bits(link))
