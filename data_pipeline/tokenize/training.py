"""Train a tokenizer on documents, and write a folder that builds, transformers and exports can read."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal

from ponder_scale.errors import ConfigError, TokenizerError
from ponder_scale.files.delete import MARK, delete_contents, delete_file, held

END_OF_TEXT = "<|endoftext|>"
BYTES = 256  # every byte has a token, so no text is unknown
MAX_SENTENCE_BYTES = 2**16  # limit in SentencePiece training, which leaves out longer lines

Kind = Literal["bpe", "sentencepiece"]
# names in an unfinished folder
_FILES = frozenset({MARK, "tokenizer.json", "tokenizer.model", "tokenizer_config.json"})


def train_tokenizer(texts: Iterable[str], vocab_size: int, kind: Kind, out: Path) -> int:
    """Write the tokenizer folder `out`, whole or not at all. Returns the size of its vocabulary.

    The same texts give the same tokenizer. Raises ConfigError if `out` exists, if the vocabulary is too small to hold
    every byte, or if there is no text. Raises TokenizerError if there are too few texts to train on.
    """
    if out.exists():
        raise ConfigError(f"--out is {out}, which exists; remove it or choose another folder")
    smallest = BYTES + 1 if kind == "bpe" else BYTES + 3
    if vocab_size <= smallest:
        raise ConfigError(f"--vocab-size is {vocab_size}; {kind} needs more than {smallest}")
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise ConfigError("the inputs hold no text to train on; give files with text in UTF-8")
    texts = chain([first], texts)
    partial = out.with_name(out.name + ".partial")
    with held(partial, _FILES.__contains__):
        delete_contents(partial, _FILES.__contains__, keep=[MARK])
        try:
            train = _train_bpe if kind == "bpe" else _train_pieces
            trained = train(texts, vocab_size, partial)
            delete_file(partial / MARK)
            partial.rename(out)
        except BaseException:
            delete_contents(partial, _FILES.__contains__)
            raise
    return trained


def _train_bpe(texts: Iterable[str], vocab_size: int, folder: Path) -> int:
    """Train byte-level byte-pair encoding, and write it as a folder for AutoTokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_settings(folder, eos_token=END_OF_TEXT)
    return tokenizer.get_vocab_size()


def _train_pieces(texts: Iterable[str], vocab_size: int, folder: Path) -> int:
    """Train SentencePiece byte-pair encoding that keeps every byte of a text."""
    import sentencepiece

    lines, model = _Lines(texts), io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,  # not a file name, which would become part of the model
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            # A space before each text would be lost when transformers reads the model.
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=MAX_SENTENCE_BYTES,
            minloglevel=1,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        reason = " ".join(str(error).split()).rpartition("] ")[2]
        raise TokenizerError(f"sentencepiece cannot train {vocab_size:,} tokens on these texts: {reason}") from error
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    _write_settings(folder, eos_token="</s>", unk_token="<unk>")
    return vocab_size


def _write_settings(folder: Path, **special_tokens: str) -> None:
    """Write the settings that transformers' AutoTokenizer needs beside the model."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        **special_tokens,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


class _Lines:
    """The lines of some texts. It keeps the error that ended them, because the trainer passes on only its message."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.error: BaseException | None = None
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                yield from filter(None, text.splitlines())
        except BaseException as error:
            self.error = error
            raise
