"""The baselines of `python -m benchmarks data`. Each turns a .jsonl into token files in the way its users do.

    python -m benchmarks.baselines NAME CORPUS TOKENIZER OUT

per_document follows the default path of Megatron-LM's preprocess_data.py with its HuggingFaceTokenizer. It is written
here from its description (August 2026). The processes of a pool parse one line at a time, encode it with transformers'
fast tokenizer, called as Megatron calls it, and send back lists of integers. One writer stores them.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_PER_TASK = 32  # lines, as in Megatron-LM
_tokenizer: Any = None


def _load(tokenizer: Path) -> None:
    global _tokenizer
    import tokenizers

    _tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))


def _load_transformers(tokenizer: Path) -> None:
    global _tokenizer
    import transformers

    _tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))


def _encode(line: str) -> list[int]:
    ids: list[int] = _tokenizer(json.loads(line)["text"]).input_ids
    return ids


def per_document(corpus: Path, tokenizer: Path, out: Path) -> None:
    """Megatron-LM's default path, one document at a time."""
    _load_transformers(tokenizer)
    dtype = _dtype(len(_tokenizer))
    lengths: list[int] = []
    out.mkdir()
    with (
        corpus.open(encoding="utf-8") as lines,
        multiprocessing.Pool(1, _load_transformers, (tokenizer,)) as pool,
        (out / "tokens.bin").open("wb") as stream,
    ):
        for ids in pool.imap(_encode, lines, _PER_TASK):
            stream.write(np.array([*ids, 0], dtype=dtype).tobytes())
            lengths.append(len(ids) + 1)
    np.array(lengths, dtype=np.int32).tofile(out / "lengths")


def datasets_map(corpus: Path, tokenizer: Path, out: Path) -> None:
    """`datasets.map` over batches, saved to disk."""
    import datasets
    import transformers

    encode = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))

    def tokens(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": encode(batch["text"])["input_ids"]}

    datasets.disable_progress_bars()
    data = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(out / "cache"))
    data.map(tokens, batched=True, remove_columns=data.column_names).save_to_disk(str(out / "tokens"))


def datatrove(corpus: Path, tokenizer: Path, out: Path) -> None:
    """datatrove's DocumentTokenizer on one task."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    reader = JsonlReader(str(corpus.parent), glob_pattern=corpus.name)
    writer = DocumentTokenizer(
        str(out / "tokens"),
        tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
        shuffle_documents=False,
        local_working_dir=str(out / "scratch"),
    )
    LocalPipelineExecutor([reader, writer], tasks=1, workers=1, logging_dir=str(out / "logs")).run()


def streaming(corpus: Path, tokenizer: Path, out: Path) -> None:
    """MosaicML streaming's MDSWriter on batches of 1,000 encoded documents."""
    from streaming import MDSWriter

    _load(tokenizer)
    dtype = _dtype(_tokenizer.get_vocab_size())
    with MDSWriter(out=str(out / "tokens"), columns={"tokens": f"ndarray:{dtype.name}"}) as writer:
        for texts in _batches(corpus):
            for encoding in _tokenizer.encode_batch_fast(texts):
                writer.write({"tokens": np.array(encoding.ids, dtype=dtype)})


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)  # Megatron's rule


def _batches(corpus: Path) -> Iterator[list[str]]:
    batch = []
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            batch.append(json.loads(line)["text"])
            if len(batch) == 1000:
                yield batch
                batch = []
    yield batch


BASELINES = {
    "per_document": per_document,
    "datasets_map": datasets_map,
    "datatrove": datatrove,
    "streaming": streaming,
}
NEEDS = {"datatrove": "datatrove", "streaming": "streaming"}  # packages that this project does not install


if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    BASELINES[name](*map(Path, paths))
