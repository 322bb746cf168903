"""Tiny corpora, the command that builds shards of them, and what the shards hold."""

import json
from pathlib import Path

import numpy as np

from data_pipeline.cli import main
from ponder_scale.shards.format import open_shards

WORDS = ["ponder", "scale", "token", "shard", "a", "the", "of", "12", "\n", "Größe"]


def make_texts(count: int, seed: int = 0) -> list[str]:
    generator = np.random.default_rng(seed)
    return [f"{i}: " + " ".join(generator.choice(WORDS, generator.integers(1, 40))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def arguments(path: Path, tokenizer: Path, out: Path, *more: str) -> list[str]:
    source = ["sources.web.kind=jsonl", f"sources.web.path={path}"]
    return ["build", f"out={out}", f"tokenizer={tokenizer}", *source, "heldout_fraction=0.1", *more]


def documents(folder: Path, split: str) -> list[list[int]]:
    found = []
    for shard in open_shards(folder).split(split):
        ends = np.cumsum(shard.lengths)
        found += [shard.tokens[end - length : end].tolist() for end, length in zip(ends, shard.lengths, strict=True)]
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def adopt(files, kind, tokenizer, out, *more) -> int:
    names = [str(path) for path in files]
    return main(["adopt", *names, "--kind", kind, "--tokenizer", str(tokenizer), "--out", str(out), *more])
