"""One interface to the tokenizers that make shards. It takes texts and returns one flat array of tokens.

By default, text that looks like a special token is ordinary text, so that data cannot end a document or open a role.
The libraries here are the reference for the faster engines in `backends`.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.config import BuildConfig
from ponder_scale.errors import TokenizerError
from ponder_scale.files.links import resolved
from ponder_scale.files.write import sync, sync_folder
from ponder_scale.shards.manifest import tokenizer_sha256

CONFIG = "tokenizer_config.json"  # transformers' settings
END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>")
# Files beside the one that decides the tokens. None of them is such a file itself.
_BESIDE = (CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class Tokenizer(Protocol):
    """What a build needs from a tokenizer."""

    path: Path  # of the one file that decides the tokens
    sha256: str  # its identity: the hash of that file
    vocab_size: int  # one more than the largest token id
    eod_id: int  # the token that ends a document
    bos_id: int | None  # the token that begins a document, if requested
    special: list[str]  # special tokens as they would appear in a text

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all texts one after another, (n,) int32, and the length of each text, (texts,) int64."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens."""


def open_tokenizer(
    path: Path, eod_token: str | None = None, bos_token: str | None = None, special_in_text: bool = False
) -> Tokenizer:
    """Open the tokenizer of a folder (tokenizer.json, or else a SentencePiece .model) or of one such file.

    With `special_in_text`, special tokens that are spelled out in a text become those tokens.
    Raises TokenizerError if there is none, if it has no end-of-document token, or if it lacks the requested tokens.
    """
    if not path.exists():
        raise TokenizerError(f"tokenizer {path}: no such file or folder")
    if path.is_file():
        candidates = [path]
    else:
        candidates = [*path.glob("tokenizer.json"), *sorted(path.glob("*.model"))]
    for file in candidates:
        if file.suffix == ".json":
            return TokenizersTokenizer(file, eod_token, bos_token, special_in_text)
        if file.suffix == ".model":
            if special_in_text:
                raise TokenizerError(
                    f"special_tokens_in_text is tokens; SentencePiece models ({file}) never read special tokens in a "
                    f"text; use special_tokens_in_text=text or a tokenizer.json"
                )
            return SentencePieceTokenizer(file, eod_token, bos_token)
    raise TokenizerError(f"tokenizer {path}: expected a tokenizer.json or a SentencePiece .model file")


def tokenizer_of(path: Path, config: BuildConfig) -> Tokenizer:
    """Open a tokenizer with the end tokens and the treatment of special tokens that a build requests."""
    return open_tokenizer(path, config.eod_token, config.bos_token, config.special_tokens_in_text == "tokens")


def save(tokenizer: Tokenizer, folder: Path) -> list[Path]:
    """Copy the tokenizer's files into a new folder that opens as this tokenizer without the original. Returns the
    copies.

    Raises TokenizerError if the tokenizer has changed since it was opened, or if a file beside it is a link out of its
    folder.
    """
    folder.mkdir()
    own = "tokenizer.json" if tokenizer.path.suffix == ".json" else tokenizer.path.name
    beside = {name: tokenizer.path.with_name(name) for name in _BESIDE}
    copies = []
    for name, path in sorted({own: tokenizer.path, **beside}.items()):
        if path.is_file():
            if path != tokenizer.path:
                resolved(path.parent, path)
            copies.append(folder / name)
            with copies[-1].open("wb") as stream:
                stream.write(path.read_bytes())
                sync(stream)
    sync_folder(folder)
    if tokenizer_sha256([folder / own]) != tokenizer.sha256:
        raise TokenizerError(f"tokenizer {tokenizer.path}: changed during the build; build again")
    return copies


class TokenizersTokenizer:
    """A tokenizer.json, read with the `tokenizers` library."""

    def __init__(self, path: Path, eod_token: str | None, bos_token: str | None, special_in_text: bool) -> None:
        try:
            self._tokenizer, self.vocab_size = _loaded(path.read_bytes(), special_in_text)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"tokenizer {path}: cannot be read: {error}") from error
        dropout = getattr(self._tokenizer.model, "dropout", None)
        if dropout:
            raise TokenizerError(
                f"tokenizer {path}: model.dropout is {dropout:g}: a text would have other tokens each time; set it to "
                f"null"
            )
        self.special_in_text = special_in_text
        self.path, self.sha256 = path, tokenizer_sha256([path])
        names = [eod_token] if eod_token else _ends(path, self._tokenizer.token_to_id)
        self.eod_id: int = _first_known(path, map(self._tokenizer.token_to_id, names), "eod_token", eod_token)
        self.bos_id: int | None = None
        if bos_token:
            self.bos_id = _first_known(path, [self._tokenizer.token_to_id(bos_token)], "bos_token", bos_token)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self.special = sorted(token.content for token in added if token.special)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = array("i"), []
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = encoding.ids
            tokens.fromlist(ids)
            lengths.append(len(ids))
        return np.array(tokens, dtype=np.int32), np.array(lengths, dtype=np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))


class SentencePieceTokenizer:
    """A .model file, read with the `sentencepiece` library."""

    def __init__(self, path: Path, eod_token: str | None, bos_token: str | None) -> None:
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.Load(str(path))
        except (OSError, RuntimeError) as error:
            raise TokenizerError(f"tokenizer {path}: cannot be read as a SentencePiece model") from error
        self.path, self.sha256 = path, tokenizer_sha256([path])
        self.vocab_size: int = self._processor.vocab_size()
        own = self._processor.eos_id()
        usual = [*([self._processor.id_to_piece(own)] if own >= 0 else []), *END_TOKENS]
        ids = [self._id(name) for name in ([eod_token] if eod_token else _ends(path, self._id, usual))]
        self.eod_id: int = _first_known(path, ids, "eod_token", eod_token)
        self.bos_id: int | None = None
        if bos_token:
            self.bos_id = _first_known(path, [self._id(bos_token)], "bos_token", bos_token)
        every = range(self.vocab_size)
        self.special = [
            self._processor.id_to_piece(i)
            for i in every
            if self._processor.is_control(i) or self._processor.is_unknown(i)
        ]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = array("i"), []
        for ids in self._processor.encode(list(texts), num_threads=1):
            tokens.fromlist(ids)
            lengths.append(len(ids))
        return np.array(tokens, dtype=np.int32), np.array(lengths, dtype=np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._processor.decode([int(token) for token in tokens]))

    def _id(self, name: str) -> int | None:
        token = self._processor.piece_to_id(name)
        return None if token == self._processor.unk_id() else int(token)


@lru_cache(maxsize=2)
def _loaded(content: bytes, special_in_text: bool) -> tuple[Any, int]:
    """The library's tokenizer and the size of its vocabulary. Cached, because a build opens it several times."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    tokenizer.encode_special_tokens = not special_in_text
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer, max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def encoder(tokenizer: Tokenizer, special_in_text: bool) -> Callable[[str], list[int]]:
    """A function that tokenizes one text with the tokenizer's own library and the given treatment of special tokens.

    SentencePiece never reads special tokens in texts.
    """
    if tokenizer.path.suffix == ".model":
        return lambda text: tokenizer.encode_batch([text])[0].tolist()
    library, _ = _loaded(tokenizer.path.read_bytes(), special_in_text)
    return lambda text: list(library.encode(text, add_special_tokens=False).ids)


def _ends(path: Path, id_of: Callable[[str], int | None], usual: Sequence[str] = END_TOKENS) -> list[str]:
    """The end-of-text token declared in transformers' files beside a tokenizer, or else the usual ones.

    Raises TokenizerError if the tokenizer lacks the declared token, because any other would not be what its maker
    meant.
    """
    for file in (path.with_name(name) for name in (CONFIG, "special_tokens_map.json")):
        if not file.is_file():
            continue
        try:
            value: Any = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise TokenizerError(f"tokenizer {file}: not a JSON object: {error}") from error
        name = value.get("content") if isinstance(value, dict) else value
        if not isinstance(name, str):
            continue
        if id_of(name) is None:
            raise TokenizerError(
                f"tokenizer {file}: eos_token is {name!r}, which {path.name} does not have; save both again with "
                f"AutoTokenizer.from_pretrained(FOLDER).save_pretrained(NEW), or give eod_token=TOKEN"
            )
        return [name]
    return list(usual)


def _first_known(path: Path, ids: Iterable[int | None], knob: str, asked: str | None) -> int:
    for token in ids:
        if token is not None:
            return token
    if asked:
        raise TokenizerError(f"tokenizer {path}: {knob} is {asked!r}, which is not in its vocabulary")
    raise TokenizerError(
        f"tokenizer {path}: names no end-of-text token and has none of {', '.join(END_TOKENS)}; give eod_token=TOKEN"
    )
